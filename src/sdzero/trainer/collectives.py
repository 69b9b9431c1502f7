"""What the ranks of a job tell each other."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed as dist

T = TypeVar("T")


def all_gather_objects(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks; of one process alone its own. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
