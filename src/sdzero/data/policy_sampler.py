"""Sampling from a policy: the rollout engine's start, weight sync, restarts and log-probability check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from sdzero.data.engine_restarts import EngineRestarts
from sdzero.data.sampler import Sampler
from sdzero.engines.base import EngineError, EngineSpec
from sdzero.prompts import PromptBuilder
from sdzero.trainer.shares import Share
from sdzero.types import Prompt, Rollout, Sampling, ScoredRollout

NUM_CHECKED = 4
"""Responses scored by the trainer after each sync, to compare log-probabilities."""


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
        self.max_logprob_gap = max_logprob_gap
        restarts = None if max_restarts is None else EngineRestarts(max_restarts, self.restart, all_reduce_max)
        self.restarts = restarts
        self.logprob_gap: float | None = None  # None: not compared since the last sync
        self._is_warm = False

    @property
    def policy_version(self) -> int:
        return 0 if self.policy is None else self.policy.policy_version

    def start(self) -> None:
        self.sampler.engine.start(self.spec, self.builder)
        self._is_warm = False

    def restart(self) -> None:
        """Restarts the engine on every rank: weight sync and some engines' start are collective."""
        self.sampler.engine.close()
        self.start()

    def sync(self) -> dict[str, float]:
        """Updates the engine to the policy's version if it holds another; returns the seconds. Collective.

        The engine's warm-up, once after each start, is timed apart, so that generation is not charged for it.
        """
        engine, seconds = self.sampler.engine, 0.0
        if self.policy is not None:
            engine.wake()
            if engine.policy_version == self.policy_version:
                return {"sync_seconds": 0.0, "warmup_seconds": 0.0}
            report = engine.sync(self.policy.policy_weights(), self.policy_version)
            self.sampler.weights, seconds = report.checksum, report.seconds
            self.logprob_gap = None
        started = time.monotonic()
        if not self._is_warm:
            engine.warm_up()
            self._is_warm = True
            return {"sync_seconds": seconds, "warmup_seconds": time.monotonic() - started}
        return {"sync_seconds": seconds, "warmup_seconds": 0.0}

    def retry(self, sample: Callable[[], tuple[list[Any], dict[str, float]]]) -> tuple[list[Any], dict[str, float]]:
        """`sample()`, repeated after an engine failure, with the number of restarts among its statistics."""
        if self.restarts is None:
            return sample()
        items, stats = self.restarts.retry(sample)
        return items, {**stats, "engine_restarts": self.restarts.num}

    def check(self, scored: Sequence[ScoredRollout]) -> dict[str, float]:
        """Compares the engine's log-probabilities with the trainer's, once per sync. Collective.

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
    ) -> tuple[list[ScoredRollout], dict[str, float]]:
        """Scored responses to the prompts of this rank's share, and statistics of sampling. Collective over ranks.

        Every member of the share gets all of them. `group` names the calls in the journal.
        """

        def sample() -> tuple[list[ScoredRollout], dict[str, float]]:
            stats = self.sync()
            started = time.monotonic()
            self.sampler.call_size = call_size
            own = self.share.scatter(prompts)
            scored = self.sampler.sample(own, sampling, group, self.policy_version, keep_partial=keep_partial)
            return scored, {**stats, "generate_seconds": time.monotonic() - started}

        own, stats = self.retry(sample)
        scored = self.share.gather(own)
        return scored, {**stats, **self.check(scored)}
