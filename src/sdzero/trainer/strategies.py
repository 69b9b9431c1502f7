"""Strategies for the Trainer: FSDP2, with tensor parallelism where it is asked for, and who then shares a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from sdzero.trainer.collectives import all_gather_objects
from sdzero.trainer.sharded_checkpoint import AtomicFolders, load_optimizer

T = TypeVar("T")


class FullShard(AtomicFolders, ModelParallelStrategy):
    """FSDP2: student and teacher are each sharded, decoder layer by decoder layer, over all processes of all nodes.

    Lightning's own `data_parallel_size: auto` is the number of nodes. This is the whole number of processes, so that
    one config serves one device and a cluster.

    Args:
        tensor_parallel_size: neighbouring processes that compute a batch together, each with its part of every
            layer's weight matrices. It divides the number of processes and the models' attention heads, and pays off
            inside a node only. The remaining factor is data parallel.
        save_distributed_checkpoint: each rank writes its shard; else rank 0 gathers all into one file.
        timeout_minutes: limit of one collective operation. Ranks whose responses take longer keep the others waiting.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        timeout_minutes: float = 120.0,
    ) -> None:
        if tensor_parallel_size < 1:
            raise ValueError(f"strategy.tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        timeout: Any = timedelta(minutes=timeout_minutes)
        super().__init__(1, tensor_parallel_size, save_distributed_checkpoint, timeout=timeout)
        self.tensor_parallel_size = tensor_parallel_size

    @property
    def writes_folders(self) -> bool:
        return self._save_distributed_checkpoint

    def setup_environment(self) -> None:
        num_processes = self.num_nodes * self.num_processes
        if num_processes % self.tensor_parallel_size:
            raise ValueError(
                f"strategy.tensor_parallel_size={self.tensor_parallel_size} does not divide the number of processes, "
                f"which is {num_processes}: set trainer.devices and trainer.num_nodes, or another size"
            )
        self._data_parallel_size = num_processes // self.tensor_parallel_size
        if self.root_device.type == "cuda":  # under student.cpu_offload gradients are reduced in host memory
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only)
        # Lightning numbers an optimizer's weights as the model does, which is wrong where the model has frozen ones
        optimizers, self.optimizers = self.optimizers, []
        checkpoint = super().load_checkpoint(path, weights_only)
        self.optimizers = optimizers
        assert self.model is not None
        for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
            load_optimizer(self.model, optimizer, state)
        return checkpoint


class FSDP(AtomicFolders, FSDPStrategy):
    """Lightning's FSDPStrategy (FSDP1), full shard: student and teacher, decoder layer by decoder layer.

    The models wrap themselves, so Lightning's keys of wrapping, precision and offload have no use here. Each rank
    writes its shard of a checkpoint.

    Args:
        timeout_minutes: limit of one collective operation. Ranks whose responses take longer keep the others waiting.
    """

    def __init__(self, timeout_minutes: float = 120.0) -> None:
        timeout = timedelta(minutes=timeout_minutes)
        super().__init__(timeout=timeout, sharding_strategy="FULL_SHARD", state_dict_type="sharded")

    @property
    def writes_folders(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_file():  # Lightning's way of reading it crashes in native code
            raise ValueError(
                f"{path} is a checkpoint in one file, which FSDPStrategy does not read: go on with "
                "sdzero.trainer.FullShard (configs/trainer/fsdp2.yaml)"
            )
        return super().load_checkpoint(path, weights_only)

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        # batches hold no tensor to convert, and Lightning fails to look into frozen dataclasses for one
        self.precision_plugin.convert_input = lambda data: data


@dataclass(frozen=True)
class Share:
    """Which share of the data is a rank's. The ranks of a tensor-parallel group have one share together.

    Attributes:
        index: of the share, among `num_shares`.
        member: this rank's place among the `num_members` ranks of its group. Member 0 writes what they all know.
        across: a process group with one rank of each share, over which values are summed; None: all ranks.
        within: the process group of this share; None: this rank alone.
    """

    index: int
    num_shares: int
    member: int = 0
    num_members: int = 1
    across: dist.ProcessGroup | None = None
    within: dist.ProcessGroup | None = None

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this rank takes care of, of those of its share."""
        return items[self.member :: self.num_members]

    def whole(self, part: list[T]) -> list[T]:
        """The items of the share in order, from each member's `part`. Collective over the members."""
        if self.num_members == 1:
            return part
        parts = all_gather_objects(part, self.within)
        whole: list[Any] = [None] * sum(map(len, parts))
        for member, items in enumerate(parts):
            whole[member :: self.num_members] = items
        return whole


def share_of(trainer: L.Trainer) -> Share:
    """This rank's share of the data, as the Trainer's strategy has it."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        shares, members = strategy.device_mesh["data_parallel"], strategy.device_mesh["tensor_parallel"]
        place = (shares.get_local_rank(), shares.size(), members.get_local_rank(), members.size())
        return Share(*place, across=shares.get_group(), within=members.get_group())
    return Share(trainer.global_rank, trainer.world_size)
