"""Semaphore over the number of concurrent runs and their memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ResourceSemaphore:
    """Bound on concurrent runs and on the sum of their memory limits.

    Args:
        max_runs: maximum number of concurrent runs.
        memory_mb: maximum sum of their limits, in MiB. A single run may exceed it.
    """

    def __init__(self, max_runs: int, memory_mb: float) -> None:
        self.max_runs, self.memory_mb = max_runs, memory_mb
        self._num_runs, self._reserved = 0, 0.0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def acquire(self, memory_mb: float) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(memory_mb))
            self._num_runs, self._reserved = self._num_runs + 1, self._reserved + memory_mb
        try:
            yield
        finally:
            async with self._changed:
                self._num_runs, self._reserved = self._num_runs - 1, self._reserved - memory_mb
                self._changed.notify_all()

    def _fits(self, memory_mb: float) -> bool:
        return not self._num_runs or (self._num_runs < self.max_runs and self._reserved + memory_mb <= self.memory_mb)
