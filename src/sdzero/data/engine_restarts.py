"""A draw whose engine dies is made again with the engine started anew, a bounded number of times."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from sdzero.engines.base import EngineDied, EngineError

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Restarts:
    """Counts the restarts of a rollout engine.

    Attributes:
        limit: so many, and then the run stops.
        restart: starts the engine anew, also where it was another rank's that died.
        largest: a number's largest value over the ranks that make a draw together.
        num: restarts so far.
    """

    limit: int
    restart: Callable[[], None]
    largest: Callable[[int], int] = lambda value: value
    num: int = 0

    def draw(self, make: Callable[[], T]) -> T:
        """What `make` returns. Finished calls come from the journal when it is called again.

        Raises:
            EngineError: the engine died once more than `limit` allows.
        """
        while True:
            made, fault = _attempt(make)
            if not self.largest(int(bool(fault))):
                return cast(T, made)
            fault = fault or "the engine of another rank died"
            self.num += 1
            if self.num > self.limit:
                raise EngineError(f"{fault}. The engine was restarted max_engine_restarts={self.limit} times before")
            log.warning("%s: restart %d of at most %d", fault, self.num, self.limit)
            self.restart()


def _attempt(make: Callable[[], T]) -> tuple[T | None, str]:
    """The value, or what the engine died of. The error itself ends here: its traceback holds the engine's memory."""
    try:
        return make(), ""
    except EngineDied as error:
        log.warning("the engine died", exc_info=True)
        return None, str(error)
