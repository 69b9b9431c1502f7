"""Assignment of a batch's items to ranks, and collectives over the ranks that compute a share together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import distributed as dist

from sdzero.trainer.collectives import all_gather_objects

if TYPE_CHECKING:
    import lightning as L

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """A rank's share of the data. The ranks of a tensor-parallel group have one share together."""

    index: int = 0  # among `num_shares`
    num_shares: int = 1
    member: int = 0  # among the `num_members` ranks of its group; member 0 writes what is common to them
    num_members: int = 1
    across: dist.ProcessGroup | None = None  # one rank of each share, over which metrics add up; None: all ranks
    within: dist.ProcessGroup | None = None  # the ranks of this share; None: this rank alone

    def scatter(self, items: Sequence[T]) -> Sequence[T]:
        """Return this member's part of the items of its share."""
        return items[self.member :: self.num_members]

    def gather(self, part: list[T]) -> list[T]:
        """Gather the items of the share in order from each member's part: the inverse of `scatter`. Collective."""
        if self.num_members == 1:
            return part
        parts = all_gather_objects(part, self.within)
        items: list[Any] = [None] * sum(map(len, parts))
        for member, of_member in enumerate(parts):
            items[member :: self.num_members] = of_member
        return items


def share_of(trainer: L.Trainer) -> Share:
    """Return this rank's share of the data under the Trainer's strategy."""
    from lightning.pytorch.strategies import ModelParallelStrategy  # collection does without Lightning

    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        shares, members = strategy.device_mesh["data_parallel"], strategy.device_mesh["tensor_parallel"]
        place = (shares.get_local_rank(), shares.size(), members.get_local_rank(), members.size())
        return Share(*place, across=shares.get_group(), within=members.get_group())
    return Share(trainer.global_rank, trainer.world_size)
