"""Sampling from a policy: the rollout engine's start, weight sync, restarts and log-probability check."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from sdzero.data.sampler import Sampler
from sdzero.engines.base import EngineDied, EngineError, EngineSpec
from sdzero.prompts import PromptBuilder
from sdzero.trainer.shares import Share
from sdzero.types import Prompt, Rollout, Sampling, ScoredRollout

log = logging.getLogger(__name__)

NUM_CHECKED = 4
"""Responses scored by the trainer after each sync, to compare log-probabilities."""

Sampled = tuple[list[ScoredRollout], dict[str, float]]
"""Scored responses, and statistics of sampling them."""


class Policy(Protocol):
    """The LightningModule that is sampled from."""

    builder: PromptBuilder
    policy_version: int
    student_config: Any
    hf_config: Any

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]: ...
    def policy_logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]: ...


class PolicySampler:
    """Scored responses of a policy's current weights. The engine is restarted after a failure.

    Args:
        sampler: makes and keeps the generate calls.
        spec: model and limits that the engine is started with.
        builder: the model's prompt builder.
        policy: source of the weights; None: the engine loads them itself (`spec.load_weights`).
        share: this rank's share of the data. Its members sample a part of the prompts each.
        max_restarts: maximum number of engine restarts; None: an engine failure ends the run.
        max_logprob_gap: mean absolute difference of log-probabilities, in nats, above which the run ends.
        all_reduce_max: maximum of a number over the ranks that sample together.
    """

    def __init__(
        self,
        sampler: Sampler,
        spec: EngineSpec,
        builder: PromptBuilder,
        policy: Policy | None = None,
        share: Share = Share(),
        max_restarts: int | None = 2,
        max_logprob_gap: float = 0.3,
        all_reduce_max: Callable[[int], int] = lambda value: value,
    ) -> None:
        self.sampler, self.spec, self.builder, self.policy, self.share = sampler, spec, builder, policy, share
        self.max_restarts, self.max_logprob_gap, self.all_reduce_max = max_restarts, max_logprob_gap, all_reduce_max
        self.num_restarts = 0
        self.logprob_gap: float | None = None  # None: not compared since the last sync
        self._is_warm = False

    @property
    def policy_version(self) -> int:
        return 0 if self.policy is None else self.policy.policy_version

    def start(self) -> None:
        self.sampler.engine.start(self.spec, self.builder)
        self._is_warm = False

    def sync(self) -> dict[str, float]:
        """Update the engine to the policy's version if it holds another; return the seconds. Collective.

        The engine's warm-up, once after each start, is timed apart, so that generation is not charged for it.
        """
        engine, stats = self.sampler.engine, {"sync_seconds": 0.0, "warmup_seconds": 0.0}
        if self.policy is not None:
            engine.wake()
            if engine.policy_version == self.policy_version:
                return stats
            report = engine.sync(self.policy.policy_weights(), self.policy_version)
            self.sampler.weights, stats["sync_seconds"] = report.checksum, report.seconds
            self.logprob_gap = None
        if not self._is_warm:
            started = time.monotonic()
            engine.warm_up()
            self._is_warm = True
            stats["warmup_seconds"] = time.monotonic() - started
        return stats

    def retry(self, sample: Callable[[], Sampled]) -> Sampled:
        """Call `sample`, again after each engine failure, and add the number of restarts to its statistics. Collective.

        Every rank restarts, whichever rank's engine failed: weight sync and some engines' start are collective. A
        repeated `sample()` takes finished calls from the journal.

        Raises:
            EngineError: the engine failed once more than `max_restarts` allows.
        """
        if self.max_restarts is None:
            return sample()
        while True:
            sampled, fault = _attempt(sample)
            if not self.all_reduce_max(int(sampled is None)):
                assert sampled is not None
                return sampled[0], {**sampled[1], "engine_restarts": self.num_restarts}
            fault = fault or "the engine of another rank died"
            self.num_restarts += 1
            if self.num_restarts > self.max_restarts:
                raise EngineError(
                    f"{fault}. The engine was restarted max_engine_restarts={self.max_restarts} times before"
                )
            log.warning("%s: restart %d of at most %d", fault, self.num_restarts, self.max_restarts)
            self.sampler.engine.close()
            self.start()

    def check(self, scored: Sequence[ScoredRollout]) -> dict[str, float]:
        """Compare the engine's log-probabilities with the trainer's, once per sync. Collective.

        Raises:
            EngineError: they differ by more than `max_logprob_gap`.
        """
        if self.policy is None:
            return {}
        if self.logprob_gap is None:
            num_checked = max(NUM_CHECKED, self.share.num_members)  # one or more of each member's engine
            rollouts = [s.rollout for s in scored if s.rollout.token_ids][:num_checked]
            gaps = [
                abs(of_engine - of_trainer)
                for rollout, logprobs in zip(rollouts, self.policy.policy_logprobs(rollouts), strict=True)
                for of_engine, of_trainer in zip(rollout.logprobs, logprobs.tolist(), strict=True)
            ]
            gap = sum(gaps) / max(len(gaps), 1)
            if not gap <= self.max_logprob_gap:  # nan too
                raise EngineError(
                    f"after the sync of policy version {self.policy_version} the engine's log-probabilities "
                    f"are {gap:.4g} nats off the trainer's (max_logprob_gap={self.max_logprob_gap}): "
                    "stale or garbled weights"
                )
            self.logprob_gap = gap
        return {"logprob_gap": self.logprob_gap}

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, call_size: int, keep_partial: bool = True
    ) -> Sampled:
        """Sample scored responses to the prompts of this rank's share. Collective over ranks.

        Every member of the share gets all of them. `group` names the calls in the journal.
        """

        def sample() -> Sampled:
            stats = self.sync()
            started = time.monotonic()
            self.sampler.call_size = call_size
            own = self.share.scatter(prompts)
            scored = self.sampler.sample(own, sampling, group, self.policy_version, keep_partial=keep_partial)
            return scored, {**stats, "generate_seconds": time.monotonic() - started}

        own, stats = self.retry(sample)
        scored = self.share.gather(own)
        return scored, {**stats, **self.check(scored)}


def _attempt(sample: Callable[[], Sampled]) -> tuple[Sampled | None, str]:
    """Return the result, or the engine's error as text: the traceback of the error itself holds engine memory."""
    try:
        return sample(), ""
    except EngineDied as error:
        log.warning("the engine died", exc_info=True)
        return None, str(error)
