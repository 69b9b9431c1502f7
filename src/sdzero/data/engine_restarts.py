"""Retries of sampling after an engine failure."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from sdzero.engines.base import EngineDied, EngineError

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class EngineRestarts:
    """Retries sampling after an engine failure, at most `limit` times.

    Attributes:
        limit: maximum number of restarts.
        restart: restarts the engine; called on every rank, whichever rank's engine failed.
        all_reduce_max: maximum of a number over the ranks that sample together.
        num: restarts so far.
    """

    limit: int
    restart: Callable[[], None]
    all_reduce_max: Callable[[int], int] = lambda value: value
    num: int = 0

    def retry(self, sample: Callable[[], T]) -> T:
        """`sample()`. When it is called again, it takes finished calls from the journal.

        Raises:
            EngineError: the engine failed once more than `limit` allows.
        """
        while True:
            result, fault = _attempt(sample)
            if not self.all_reduce_max(int(bool(fault))):
                return cast(T, result)
            fault = fault or "the engine of another rank died"
            self.num += 1
            if self.num > self.limit:
                raise EngineError(f"{fault}. The engine was restarted max_engine_restarts={self.limit} times before")
            log.warning("%s: restart %d of at most %d", fault, self.num, self.limit)
            self.restart()


def _attempt(sample: Callable[[], T]) -> tuple[T | None, str]:
    """The result, or the engine's error as text. The error itself is dropped: its traceback holds engine memory."""
    try:
        return sample(), ""
    except EngineDied as error:
        log.warning("the engine died", exc_info=True)
        return None, str(error)
