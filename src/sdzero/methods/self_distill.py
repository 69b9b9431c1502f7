"""Phase 2, on-policy self-distillation (section 2.2, equation 4), and its variants with other teacher contexts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdzero.losses import Divergence, check_top_k, divergence_head
from sdzero.losses.soft_targets import HiddenTargets, SoftTargets, hidden_targets, top_k_targets
from sdzero.methods.base import Method
from sdzero.methods.batching import collate
from sdzero.methods.contexts import Context, Revision
from sdzero.models.language_model import ModelConfig
from sdzero.models.lora import AdaptersOff
from sdzero.models.parallelize import can_change_device
from sdzero.models.weights import lerp_weights
from sdzero.types import Example, LossOutput, RolloutBatch, ScoredRollout


class SelfDistill(Method):
    """Minimises, at every token of the student's own responses, the divergence between the student and a teacher that
    reads a privileged context before the same response.

    Args:
        context: context that the teacher reads before y. SD-Zero: `Revision`.
        divergence: divergence and its support.
        teacher: another model as teacher; null takes a frozen copy of the initial student or, if the student has
            adapters (`student.lora`), the student itself with its adapters switched off. The callback TeacherSync
            copies or averages the student into a teacher with weights of its own.
        mask_truncated: leave responses that were cut at the token limit out of the loss.
        teacher_first: run the teacher over all micro batches of a step before the student's first. Its outputs (last
            hidden states, or top_k) wait in host memory, and so do the teacher's weights until the next step. Off,
            each micro batch runs the teacher just before the student, with less overhead, if the teacher fits beside
            the student's training.
        kwargs: as in Method.
    """

    counters = (*Method.counters, "teacher_generation")

    def __init__(
        self,
        *args: Any,
        context: Context = Revision(),
        divergence: Divergence = Divergence(),
        teacher: ModelConfig | None = None,
        mask_truncated: bool = False,
        teacher_first: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.context, self.divergence = context, divergence
        self.teacher_config: ModelConfig = teacher or self.student_config
        self.shares_base = teacher is None and self.student_config.lora is not None
        self.mask_truncated, self.teacher_first = mask_truncated, teacher_first
        self.teacher_generation = 0
        check_top_k(divergence.top_k, self.hf_config.vocab_size)
        self.check_vocabulary("teacher", self.teacher_config)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.check_frozen(self.teacher_config)

    def configure_model(self) -> None:
        super().configure_model()
        if hasattr(self, "teacher"):
            return
        self.teacher: Any  # a module, or AdaptersOff around the student
        if self.shares_base:
            self.teacher = AdaptersOff(self.student)
        else:
            self.teacher = self.load_frozen("teacher", self.teacher_config)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._move_teacher(self.device)  # a GPU's collectives, which gather its shards, need it there
        return super().state_dict(*args, **kwargs)

    def teacher_and_context(self) -> tuple[Callable[..., Any], Context]:
        self._move_teacher(self.device)
        return self.teacher, self.context

    def update_teacher(self, weight: float = 1.0) -> None:
        """Add weight * (student - teacher) to the teacher; 1.0 synchronises and starts a new generation."""
        assert not self.shares_base
        self._move_teacher(self.device)
        lerp_weights(self.teacher, self.student, weight)
        self.teacher_generation += weight == 1.0

    def max_extra_tokens(self, max_new_tokens: int) -> int:
        """Return an upper bound of the tokens that the teacher's sequence adds to prompt + y."""
        return self.context.max_extra_tokens(self.builder, max_new_tokens)

    def examples(self, batch: RolloutBatch) -> list[Example]:
        siblings: dict[str, list[ScoredRollout]] = defaultdict(list)
        for scored in batch.scored:
            siblings[scored.rollout.prompt.question.id].append(scored)
        examples: list[Example] = []
        num_too_long = 0
        for scored in batch.scored:
            rollout, question = scored.rollout, scored.rollout.prompt.question
            if not rollout.token_ids or (self.mask_truncated and rollout.finish_reason != "stop"):
                continue
            example = Example(
                question.id,
                rollout.prompt.token_ids,
                rollout.token_ids,
                teacher_context=self.context(self.builder, scored, siblings[question.id]).token_ids,
                reward=scored.verdict.reward,
                logprobs=rollout.logprobs,
            )
            if example.length > self.max_positions:  # contexts of other texts than y have no bound in advance
                num_too_long += 1
            else:
                examples.append(example)
        self._log("teacher", {"too_long": num_too_long})
        return examples

    def loss_denominators(self, examples: Sequence[Example]) -> list[int]:
        """Count target tokens, responses, and target tokens of the responses with reward 0 and 1."""
        by_reward = [sum(len(e.target) for e in examples if e.reward == r) for r in (0, 1)]
        return [sum(by_reward), len(examples), *by_reward]

    def num_trained(self, examples: Sequence[Example]) -> int:
        return 2 * sum(len(e.target) for e in examples)  # the student's pass and the teacher's

    @property
    def packed(self) -> bool:
        return super().packed and self.teacher_config.packs

    def precompute(self, batches: Sequence[Sequence[Example]]) -> Iterable[SoftTargets]:
        return self._teacher_first(batches) if self.teacher_first else map(self.teacher_targets, batches)

    @torch.no_grad()
    def teacher_targets(self, examples: Sequence[Example]) -> SoftTargets:
        """Compute the teacher's distributions at the N target tokens of a micro batch."""
        contexts, targets = [e.teacher_context for e in examples], [e.target for e in examples]
        batch = collate(contexts, targets, self.builder.pad_id, self.packed).to(self.device)

        def head(hidden: Tensor, weight: Tensor) -> SoftTargets:
            if self._keeps_top_k:
                assert self.divergence.top_k is not None
                return top_k_targets(hidden, weight, batch.targets, self.divergence.top_k)
            return hidden_targets(hidden, weight)

        return self.teacher(batch.input_ids, batch.predicts, head, batch.position_ids)

    @property
    def _keeps_top_k(self) -> bool:
        """True if the loss depends on the teacher's top_k only, so that its head need not wait."""
        exact = self.divergence.support == "teacher" and self.divergence.outside != "tail"
        return self.teacher_first and self.divergence.top_k is not None and exact

    def _teacher_first(self, batches: Sequence[Sequence[Example]]) -> Iterator[SoftTargets]:
        self._move_teacher(self.device)
        waiting: list[SoftTargets] = []
        weight: Tensor | None = None
        for examples in batches:
            teacher = self.teacher_targets(examples)
            if isinstance(teacher, HiddenTargets) and self._teacher_moves:
                weight = teacher.weight.clone() if weight is None else weight  # the head stays on the device
                teacher = replace(teacher, weight=weight)
            waiting.append(_to_host(teacher))
        self._move_teacher(torch.device("cpu"))
        return (_map(teacher, lambda tensor: tensor.to(self.device, non_blocking=True)) for teacher in waiting)

    @property
    def _teacher_moves(self) -> bool:
        """True if the teacher's weights leave the device after its passes. `cpu_offload` moves them itself."""
        if not self.teacher_first or self.shares_base or self.device.type == "cpu":
            return False
        return can_change_device(self.teacher) and not self.teacher_config.cpu_offload

    def _move_teacher(self, device: torch.device) -> None:
        if self._teacher_moves:
            self.teacher.to(device)

    def loss(
        self, examples: Sequence[Example], denominators: Sequence[float], precomputed: SoftTargets | None = None
    ) -> LossOutput:
        teacher = self.teacher_targets(examples) if precomputed is None else precomputed
        contexts, targets = [e.context for e in examples], [e.target for e in examples]
        batch = collate(contexts, targets, self.builder.pad_id, self.packed).to(self.device)
        weights, num = self.token_weights(examples, denominators)

        def head(hidden: Tensor, weight: Tensor) -> LossOutput:
            return divergence_head(hidden, weight, teacher, weights, num, self.divergence, targets=batch.targets)

        output = self.student(batch.input_ids, batch.predicts, head, batch.position_ids)
        return LossOutput(output.loss, self._metrics(examples, output.metrics, denominators))

    def _metrics(
        self, examples: Sequence[Example], per_token: dict[str, Tensor], denominators: Sequence[float]
    ) -> dict[str, Tensor]:
        """Compute means over tokens by reward; nan without any, or Lightning would repeat the previous step's value.

        `token_kl_reward` is positive where the teacher finds the token less likely than the student.
        """
        rewards = torch.tensor([-1 if e.reward is None else e.reward for e in examples for _ in e.target])
        student_logprobs = per_token.get("student_logprobs")
        if student_logprobs is None:  # the loss skipped the full vocabulary: take the engine's, of the same weights
            student_logprobs = torch.tensor([value for e in examples for value in e.logprobs], device=self.device)
        token_kl_reward = student_logprobs - per_token["teacher_logprobs"]
        metrics = {}
        for reward, num in zip((0, 1), denominators[2:], strict=True):
            chosen = (rewards == reward).to(token_kl_reward.device)
            metrics[f"teacher/kl_r{reward}"] = per_token["divergence"][chosen].sum() / (num or math.nan)
            metrics[f"teacher/token_kl_reward_r{reward}"] = token_kl_reward[chosen].sum() / (num or math.nan)
        if "top_k_mass" in per_token:
            chosen = (rewards >= 0).to(token_kl_reward.device)
            metrics["teacher/top_k_mass"] = per_token["top_k_mass"][chosen].sum() / denominators[0]
        return metrics


def _to_host(teacher: SoftTargets) -> SoftTargets:
    """Copy all but the head to pinned host memory."""

    def move(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    return _map(teacher, move)


def _map(teacher: SoftTargets, move: Callable[[Tensor], Tensor]) -> SoftTargets:
    """Apply `move` to all tensors but the head."""
    tensors = {name: tensor for name, tensor in vars(teacher).items() if name != "weight" and tensor is not None}
    return replace(teacher, **{name: move(tensor) for name, tensor in tensors.items()})
