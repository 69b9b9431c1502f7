"""Policy gradient with group-relative advantages: GRPO, Dr. GRPO, RLOO and DAPO.

Unlike PPO it has no critic and no generalised advantage estimate: the baseline of a response is the mean reward of the
responses to the same question. One batch of rollouts is one update, so the ratio of policy to sampler is 1 and no clip
acts; the ratio's range matters where several updates share a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from sdzero.losses import PolicyLoss, policy_gradient_head
from sdzero.methods.base import Method
from sdzero.methods.batching import collate
from sdzero.models.language_model import ModelConfig
from sdzero.models.lora import AdaptersOff
from sdzero.types import Example, LossOutput, RolloutBatch, Sampling, ScoredRollout

Advantage = Literal["group_std", "group_mean", "leave_one_out"]
STD_EPSILON = 1e-6
"""Added to a group's standard deviation (verl)."""

FEW = "PolicyGradient compares the responses to one question and needs as many of each question, at least 2"


def group_advantages(rewards: Sequence[float], kind: Advantage) -> list[float]:
    """Compute the advantage of each response of a group from the rewards r of the group.

    Args:
        rewards: rewards of all responses to one question, at least two.
        kind: group_std: (r - mean) / (std + 1e-6), with the unbiased standard deviation (GRPO); group_mean: r - mean
            (Dr. GRPO); leave_one_out: r minus the mean of the others (RLOO).
    """
    mean, num = fmean(rewards), len(rewards)
    factor = {"group_mean": 1.0, "leave_one_out": num / (num - 1)}.get(kind)
    if factor is None:
        factor = 1 / (stdev(rewards) + STD_EPSILON)
    return [(reward - mean) * factor for reward in rewards]


class PolicyGradient(Method):
    """Raises the probability of the responses that are better than the others to the same question.

    Args:
        advantage: as `kind` of `group_advantages`.
        policy_loss: terms of the loss of a token.
        reference: model that `policy_loss.kl_coef` keeps the student near to; null takes a frozen copy of the initial
            student or, if the student has adapters, the student with its adapters switched off.
        zero_variance: responses of a group whose rewards are all equal have no advantage. keep: they count in the
            denominators, and in the KL and entropy terms (GRPO); drop: they are left out.
        mask_truncated: leave responses that were cut at the token limit out of the loss; they count in their group.
        overlong_buffer: tokens before `max_new_tokens` in which a length penalty grows from 0 to `overlong_factor`
            and is subtracted from the reward (DAPO); 0: no penalty. Whether a group has variance is decided without.
        overlong_factor: largest penalty.
        kwargs: as in Method.
    """

    def __init__(
        self,
        *args: Any,
        advantage: Advantage = "group_std",
        policy_loss: PolicyLoss = PolicyLoss(),
        reference: ModelConfig | None = None,
        zero_variance: Literal["keep", "drop"] = "keep",
        mask_truncated: bool = False,
        overlong_buffer: int = 0,
        overlong_factor: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if overlong_buffer < 0 or overlong_factor < 0:
            raise ValueError("overlong_buffer and overlong_factor must be at least 0")
        if reference is not None and not policy_loss.kl_coef:
            raise ValueError("reference is for policy_loss.kl_coef, which is 0: set it, or leave reference out")
        self.advantage: Advantage = advantage
        self.policy_loss, self.zero_variance = policy_loss, zero_variance
        self.reference_config = reference or self.student_config
        self.shares_base = reference is None and self.student_config.lora is not None
        self.mask_truncated = mask_truncated
        self.overlong_buffer, self.overlong_factor = overlong_buffer, overlong_factor
        self.sampling = Sampling()
        """Parameters by which the batch of the current step was sampled."""
        self.check_vocabulary("reference", self.reference_config)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None) if stage == "fit" else None
        if getattr(data, "overlap", False):
            raise ValueError("data.overlap: PolicyGradient needs rollouts of the current policy: set it to false")
        if (num := getattr(data, "rollouts_per_prompt", 2)) < 2:
            raise ValueError(f"data.rollouts_per_prompt: {FEW}, got {num}")
        if not getattr(data, "sampling", Sampling()).temperature:
            raise ValueError("data.sampling.temperature: PolicyGradient samples, so it must be above 0")
        if self.policy_loss.kl_coef:
            self.check_frozen(self.reference_config)

    def configure_model(self) -> None:
        super().configure_model()
        if not self.policy_loss.kl_coef or hasattr(self, "reference"):
            return
        self.reference: Any  # a module, or AdaptersOff around the student
        if self.shares_base:
            self.reference = AdaptersOff(self.student)
        else:
            self.reference = self.load_frozen("reference", self.reference_config)

    def examples(self, batch: RolloutBatch) -> list[Example]:
        self.sampling = batch.sampling
        groups: dict[str, list[ScoredRollout]] = defaultdict(list)
        for scored in batch.scored:
            groups[scored.rollout.prompt.question.id].append(scored)
        if len({len(group) for group in groups.values()}) > 1 or any(len(group) < 2 for group in groups.values()):
            raise ValueError(f"a batch's groups: {FEW}, got {sorted({len(group) for group in groups.values()})}")
        examples, spread = [], {"all_wrong": 0, "all_right": 0}
        for group in groups.values():
            rewards = [scored.verdict.reward for scored in group]
            is_flat = len({*rewards}) == 1
            spread["all_right" if rewards[0] else "all_wrong"] += is_flat
            if is_flat and self.zero_variance == "drop":
                continue
            shaped = [r - self.length_penalty(len(s.rollout.token_ids)) for r, s in zip(rewards, group, strict=True)]
            advantages = group_advantages(shaped, self.advantage)
            for scored, advantage in zip(group, advantages, strict=True):
                rollout = scored.rollout
                if not rollout.token_ids or (self.mask_truncated and rollout.finish_reason != "stop"):
                    continue
                examples.append(
                    Example(
                        rollout.prompt.question.id,
                        rollout.prompt.token_ids,
                        rollout.token_ids,
                        reward=scored.verdict.reward,
                        advantage=advantage,
                    )
                )
        counts = self.reduce(torch.tensor([*spread.values(), len(groups)]), "sum")
        self._log("rollout", dict(zip(spread, counts[:-1] / counts[-1], strict=True)))
        return examples

    def length_penalty(self, num_tokens: int) -> float:
        """Return the overlong penalty of a response: 0 before the buffer, `overlong_factor` at its end (DAPO)."""
        if not self.overlong_buffer:
            return 0.0
        num_over = num_tokens - (self.sampling.max_new_tokens - self.overlong_buffer)
        return self.overlong_factor * max(num_over, 0) / self.overlong_buffer

    def loss_denominators(self, examples: Sequence[Example]) -> list[int]:
        """Count target tokens, and responses."""
        return [sum(len(e.target) for e in examples), len(examples)]

    @property
    def packed(self) -> bool:
        return super().packed and self.reference_config.packs

    def precompute(self, batches: Sequence[Sequence[Example]]) -> Iterable[Tensor | None]:
        return map(self.reference_logprobs, batches) if self.policy_loss.kl_coef else repeat(None)

    @torch.no_grad()
    def reference_logprobs(self, examples: Sequence[Example]) -> Tensor:
        """Compute the reference's log-probabilities [N] of the target tokens, at the sampling temperature."""
        return self._run(self.reference, examples, torch.zeros(()), 1.0, PolicyLoss(), None).metrics["logprobs"]

    def loss(
        self, examples: Sequence[Example], denominators: Sequence[float], precomputed: Tensor | None = None
    ) -> LossOutput:
        weights, num = self.token_weights(examples, denominators)
        output = self._run(self.student, examples, weights, num, self.policy_loss, precomputed)
        counted = (weights > 0) / denominators[0]
        names = {"entropy": "entropy", "kl": "kl_reference", "clipped": "clip_fraction"}
        metrics = {name: output.metrics[key] @ counted for key, name in names.items() if key in output.metrics}
        return LossOutput(output.loss, metrics)

    def _run(
        self,
        model: Callable[..., Any],
        examples: Sequence[Example],
        weights: Tensor,
        num: float,
        policy_loss: PolicyLoss,
        reference_logprobs: Tensor | None,
    ) -> LossOutput:
        contexts, targets = [e.context for e in examples], [e.target for e in examples]
        batch = collate(contexts, targets, self.builder.pad_id, self.packed).to(self.device)
        advantages = torch.tensor([e.advantage for e in examples for _ in e.target], device=self.device)

        def head(hidden: Tensor, weight: Tensor) -> LossOutput:
            return policy_gradient_head(
                hidden,
                weight,
                batch.targets,
                advantages,
                weights.expand(len(batch.targets)),
                num,
                policy_loss,
                self.sampling.temperature,
                reference_logprobs=reference_logprobs,
            )

        return model(batch.input_ids, batch.predicts, head, batch.position_ids)
