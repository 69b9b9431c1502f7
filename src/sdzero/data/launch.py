"""The processes of a stage that has no Trainer: how they are started, and what they tell each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import distributed as dist

from sdzero.trainer.collectives import all_gather_objects

# A rank may wait as long as another samples. One that dies closes its connections, which ends the wait at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. Neighbours share an engine where it spans several.

    Attributes:
        rank: its number.
        world_size: how many there are.
        per_engine: ranks of one engine.
    """

    rank: int = 0
    world_size: int = 1
    per_engine: int = 1
    _everyone: Any = None  # process groups on the CPU; None: there is one process
    _engine: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether its engine's prompts are this rank's; the others of the engine have none."""
        return self.rank % self.per_engine == 0

    @property
    def num_engines(self) -> int:
        return self.world_size // self.per_engine

    def leader(self, number: int) -> int:
        """The rank that leads the engine whose turn it is at piece `number` of the work."""
        return number % self.num_engines * self.per_engine

    def takes(self, number: int) -> bool:
        """Whether piece `number` of the work is for this rank's engine."""
        return self.leader(number) == self.rank - self.rank % self.per_engine

    def largest(self, value: int) -> int:
        """A number's largest value over the ranks of one engine. Collective for these."""
        if self.per_engine == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._engine)
        return int(number)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value. Collective."""
        return [value] if self.world_size == 1 else all_gather_objects(value, self._everyone)

    def to_first(self, values: list[Any], owner: int) -> list[Any]:
        """On the first rank the owner's list, elsewhere an empty one. Collective for these two."""
        if self.is_first and owner != 0:
            received: list[Any] = [None]
            dist.recv_object_list(received, owner, group=self._everyone)
            return received[0]
        if self.rank == owner != 0:
            dist.send_object_list([values], 0, group=self._everyone)
        return values if self.is_first else []


def launch(devices: int | Literal["auto"], num_nodes: int, per_engine: int) -> Ranks:
    """Starts the other processes of this node by Lightning, unless torchrun or SLURM has started all of them.

    Each of them runs this very command from its start, and comes back from here too, on a device of its own.

    Raises:
        ValueError: the number of processes is no multiple of `per_engine`, or not the one that was started.
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
    fabric.launch()  # refuses other numbers than torchrun's or SLURM's
    everyone = dist.new_group(backend="gloo", timeout=_PATIENCE)
    engine, _ = dist.new_subgroups(per_engine, backend="gloo", timeout=_PATIENCE)
    return Ranks(fabric.global_rank, fabric.world_size, per_engine, everyone, engine)
