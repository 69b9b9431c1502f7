"""Sharded strategies for Lightning's Trainer: FSDP2 with optional tensor parallelism, and FSDP1."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from sdzero.trainer.sharded_checkpoint import AtomicFolders, load_optimizer


class FullShard(AtomicFolders, ModelParallelStrategy):
    """FSDP2: student and teacher are each sharded by decoder layer over all processes of all nodes.

    Lightning's own `data_parallel_size: auto` is the number of nodes. Here it is the number of processes, so that one
    config serves one device and a cluster.

    Args:
        tensor_parallel_size: neighbouring processes that compute a batch together, each with its part of every
            layer's weight matrices. Must divide the number of processes and the models' attention heads; faster only
            inside a node. The remaining factor is data parallel.
        save_distributed_checkpoint: each rank writes its shard; otherwise rank 0 gathers all into one file.
        timeout_minutes: limit of one collective operation, which includes waiting for the rank that samples longest.
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
        self.writes_folders = save_distributed_checkpoint

    def setup_environment(self) -> None:
        num_processes = self.num_nodes * self.num_processes
        if num_processes % self.tensor_parallel_size:
            raise ValueError(
                f"strategy.tensor_parallel_size={self.tensor_parallel_size} does not divide the number of processes, "
                f"which is {num_processes}: set trainer.devices and trainer.num_nodes, or another size"
            )
        self._data_parallel_size = num_processes // self.tensor_parallel_size
        if self.root_device.type == "cuda":  # student.cpu_offload reduces gradients in host memory
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only)
        # Lightning numbers an optimizer's weights like the model's, which is wrong where some are frozen
        optimizers, self.optimizers = self.optimizers, []
        checkpoint = super().load_checkpoint(path, weights_only)
        self.optimizers = optimizers
        assert self.model is not None
        for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
            load_optimizer(self.model, optimizer, state)
        return checkpoint


class FSDP(AtomicFolders, FSDPStrategy):
    """Lightning's FSDPStrategy (FSDP1), full shard: student and teacher are each sharded by decoder layer.

    The models wrap themselves, so Lightning's options for wrapping, precision and offload do not apply. Each rank
    writes its shard of a checkpoint.

    Args:
        timeout_minutes: limit of one collective operation, which includes waiting for the rank that samples longest.
    """

    def __init__(self, timeout_minutes: float = 120.0) -> None:
        timeout = timedelta(minutes=timeout_minutes)
        super().__init__(timeout=timeout, sharding_strategy="FULL_SHARD", state_dict_type="sharded")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_file():  # Lightning's reader crashes in native code
            raise ValueError(
                f"{path} is a checkpoint in one file, which FSDPStrategy does not read: resume with "
                "sdzero.trainer.FullShard (configs/trainer/fsdp2.yaml)"
            )
        return super().load_checkpoint(path, weights_only)

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        # batches hold no tensors to convert, and Lightning's search for them fails on frozen dataclasses
        self.precision_plugin.convert_input = lambda data: data
