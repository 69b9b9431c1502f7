"""Launch of collection's ranks, and collectives between them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import distributed as dist

from sdzero.trainer.collectives import all_gather_objects

# Ranks wait for the one that samples longest. A rank that dies closes its connections, which ends the wait at once.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among all ranks. Neighbouring ranks share an engine that spans several processes.

    Attributes:
        rank: index of this process.
        world_size: number of processes.
        per_engine: number of ranks of one engine.
    """

    rank: int = 0
    world_size: int = 1
    per_engine: int = 1
    _everyone: Any = None  # process groups on the CPU; None: one process
    _engine: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_leader(self) -> bool:
        """True on the rank that has the prompts of its engine; the engine's other ranks have none."""
        return self.rank % self.per_engine == 0

    @property
    def num_engines(self) -> int:
        return self.world_size // self.per_engine

    def leader(self, number: int) -> int:
        """Return the leader of the engine that does chunk `number` of the work."""
        return number % self.num_engines * self.per_engine

    def takes(self, number: int) -> bool:
        """Return whether this rank's engine does chunk `number` of the work."""
        return self.leader(number) == self.rank - self.rank % self.per_engine

    def all_reduce_max(self, value: int) -> int:
        """Return the maximum of a number over the ranks of one engine. Collective over these."""
        if self.per_engine == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._engine)
        return int(number)

    def gather(self, value: Any) -> list[Any]:
        """Gather the values of all ranks, in their order. Collective."""
        return [value] if self.world_size == 1 else all_gather_objects(value, self._everyone)

    def to_first(self, values: list[Any], owner: int) -> list[Any]:
        """Return the owner's list on the first rank, an empty one elsewhere. Collective over the two."""
        if self.is_first and owner != 0:
            received: list[Any] = [None]
            dist.recv_object_list(received, owner, group=self._everyone)
            return received[0]
        if self.rank == owner != 0:
            dist.send_object_list([values], 0, group=self._everyone)
        return values if self.is_first else []


def launch(devices: int | Literal["auto"], num_nodes: int, per_engine: int) -> Ranks:
    """Start the other processes of this node by Lightning Fabric, unless torchrun or SLURM has started all of them.

    Each process runs the same command from its start and returns from here, on a device of its own.

    Raises:
        ValueError: the number of processes is not a multiple of `per_engine`, or not the number that was started.
    """
    num_devices = max(torch.cuda.device_count(), 1) if devices == "auto" else devices
    world_size = num_devices * num_nodes
    if world_size % per_engine:
        raise ValueError(
            f"engine.tensor_parallel_size {per_engine} must divide the number of processes, which is {world_size}: "
            "start one process per GPU (devices, num_nodes)"
        )
    are_started = any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    if world_size == 1 and not are_started:
        return Ranks()
    from lightning.fabric import Fabric  # takes seconds

    fabric = Fabric(devices=num_devices, num_nodes=num_nodes, strategy="ddp")
    fabric.launch()  # raises if torchrun or SLURM has started another number
    everyone = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    engine, _ = dist.new_subgroups(per_engine, backend="gloo", timeout=_TIMEOUT)
    return Ranks(fabric.global_rank, fabric.world_size, per_engine, everyone, engine)
