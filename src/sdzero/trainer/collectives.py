"""Collectives over Python objects."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed as dist

T = TypeVar("T")


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather every rank's value, in rank order; without a process group, only this process's. Collective.

    Args:
        value: any picklable object.
        group: ranks to gather from; None: all.
    """
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
