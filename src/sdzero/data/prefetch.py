"""A batch whose rollouts are drawn in a thread, while the step before it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from sdzero.engines.base import EngineDied
from sdzero.types import Rollout

log = logging.getLogger(__name__)


@dataclass
class Ahead:
    """Begins to draw when it is made.

    Attributes:
        counter: the batch's number.
        policy_version: of the weights that draw it.
        weights: their checksum.
        draw: returns this rank's rollouts.
        stats: figures of what came before the draw, to be logged with the batch.
    """

    counter: int
    policy_version: int
    weights: str
    draw: Callable[[], Sequence[Rollout]]
    stats: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pool = ThreadPoolExecutor(1, "sdzero-ahead")
        self._future = pool.submit(self._timed)
        pool.shutdown(wait=False)  # the thread ends with its draw

    def _timed(self) -> tuple[Sequence[Rollout], float]:
        started = time.monotonic()
        return self.draw(), time.monotonic() - started

    def wait(self) -> None:
        """Until it is drawn, or failed; raises nothing."""
        wait([self._future])

    def take(self) -> tuple[Sequence[Rollout], dict[str, float]] | None:
        """The rollouts and figures; None where the engine died of it, which is logged.

        Raises: what the draw raised besides.
        """
        started = time.monotonic()
        try:
            rollouts, seconds = self._future.result()
        except EngineDied as error:
            log.warning("batch %d, drawn ahead, is lost: %s", self.counter, error)
            return None
        waited = time.monotonic() - started
        return rollouts, {**self.stats, "generate_seconds": seconds, "wait_seconds": waited}

    def drop(self) -> None:
        """For a batch that nobody will train on, once its engine is closed."""
        self.wait()
        log.warning("batch %d was drawn ahead and not trained on", self.counter)

    def state(self) -> dict[str, Any] | None:
        """What finds the rollouts again in the journal, once they are drawn; None where that failed."""
        self.wait()
        if self._future.exception() is not None:
            return None
        return {"counter": self.counter, "policy_version": self.policy_version, "weights": self.weights}
