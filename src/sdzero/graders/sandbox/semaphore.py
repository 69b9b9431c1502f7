"""How many runs may be under way at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ResourceSemaphore:
    """A number of runs, and the memory that they may take together.

    Args:
        number: runs at a time.
        memory_mb: the sum of their limits, in MiB. One run alone may exceed it.
    """

    def __init__(self, number: int, memory_mb: float) -> None:
        self.number, self.memory_mb = number, memory_mb
        self._taken, self._reserved = 0, 0.0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, memory_mb: float) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(memory_mb))
            self._taken, self._reserved = self._taken + 1, self._reserved + memory_mb
        try:
            yield
        finally:
            async with self._changed:
                self._taken, self._reserved = self._taken - 1, self._reserved - memory_mb
                self._changed.notify_all()

    def _fits(self, memory_mb: float) -> bool:
        return not self._taken or (self._taken < self.number and self._reserved + memory_mb <= self.memory_mb)
