"""A batch whose rollouts are generated in a thread while the previous step trains."""

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
class PrefetchedBatch:
    """Starts generating when it is constructed.

    Attributes:
        counter: number of the batch.
        policy_version: version of the weights that generate it.
        weights: checksum of these weights.
        generate: returns this rank's rollouts.
        stats: statistics of the sync before, logged with the batch.
    """

    counter: int
    policy_version: int
    weights: str
    generate: Callable[[], Sequence[Rollout]]
    stats: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pool = ThreadPoolExecutor(1, "sdzero-prefetch")
        self._future = pool.submit(self._timed)
        pool.shutdown(wait=False)  # the thread ends with its task

    def _timed(self) -> tuple[Sequence[Rollout], float]:
        started = time.monotonic()
        return self.generate(), time.monotonic() - started

    def wait(self) -> None:
        """Wait until the batch is generated or has failed; raises nothing."""
        wait([self._future])

    def result(self) -> tuple[Sequence[Rollout], dict[str, float]] | None:
        """Return rollouts and statistics; None, with a warning, if the engine died.

        Raises: any other exception from sampling.
        """
        started = time.monotonic()
        try:
            rollouts, seconds = self._future.result()
        except EngineDied as error:
            log.warning("batch %d, generated in advance, is lost: %s", self.counter, error)
            return None
        waited = time.monotonic() - started
        return rollouts, {**self.stats, "generate_seconds": seconds, "wait_seconds": waited}

    def discard(self) -> None:
        """End a batch that is not trained on, after its engine was closed."""
        self.wait()
        log.warning("batch %d was generated in advance and not trained on", self.counter)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the identity of the finished rollouts in the journal; None if generating them failed. Waits."""
        self.wait()
        if self._future.exception() is not None:
            return None
        return {"counter": self.counter, "policy_version": self.policy_version, "weights": self.weights}
