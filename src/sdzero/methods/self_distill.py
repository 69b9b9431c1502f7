"""Phase 2, on-policy self-distillation (section 2.2, equation 4), and its relatives by other teacher contexts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdzero.losses import Divergence, divergence_head, hidden_teacher
from sdzero.methods.base import Method
from sdzero.models import ModelConfig, lerp_weights, load
from sdzero.prompts import Context, Revision, collate
from sdzero.seeds import run_seed
from sdzero.types import Example, LossOutput, RolloutBatch, ScoredRollout


class SelfDistill(Method):
    """The student answers; the teacher, shown what `context` builds, gives a distribution at every token of that
    same answer; the student minimises the divergence to it.

    Args:
        context: what the teacher reads before y. SD-Zero: `Revision`.
        divergence: which divergence, on which support.
        teacher: another model as teacher; null takes a frozen copy of the student as it starts. The callback
            TeacherSync copies or averages the student into it.
        mask_truncated: leave responses that were cut at the token limit out of the loss.
        kwargs: as in Method.
    """

    def __init__(
        self,
        *args: Any,
        context: Context = Revision(),
        divergence: Divergence = Divergence(),
        teacher: ModelConfig | None = None,
        mask_truncated: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.context = context
        self.divergence = divergence
        self.teacher_config = teacher or self.model_config
        self.mask_truncated = mask_truncated
        self.teacher_generation = 0
        theirs = self.teacher_config.hf_config()
        self.max_positions = min(self.max_positions, getattr(theirs, "max_position_embeddings", None) or 2**31)
        vocab_size = self.hf_config.vocab_size
        if divergence.top_k is not None and divergence.top_k > vocab_size:
            raise ValueError(f"divergence.top_k={divergence.top_k} is above the vocabulary of {vocab_size} tokens")
        if theirs.vocab_size != vocab_size:
            raise ValueError(f"teacher.path: its vocabulary has {theirs.vocab_size} tokens, the student's {vocab_size}")

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "teacher"):
            teacher = load(self.teacher_config, run_seed()).requires_grad_(False)
            self.teacher = self.shard(teacher, self.teacher_config).eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sdzero"]["teacher_generation"] = self.teacher_generation

    def reviser(self) -> tuple[nn.Module, Context]:
        return self.teacher, self.context

    def update_teacher(self, weight: float = 1.0) -> None:
        """teacher += weight * (student - teacher); 1.0 synchronises and starts a new generation."""
        lerp_weights(self.teacher, self.student, weight)
        self.teacher_generation += weight == 1.0

    def max_extra_tokens(self, max_new_tokens: int) -> int:
        """What the teacher's sequence adds to prompt + y."""
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
            teacher_context = self.context(self.builder, scored, siblings[question.id]).token_ids
            example = Example(
                question.id,
                rollout.prompt.token_ids,
                rollout.token_ids,
                teacher_context=teacher_context,
                reward=scored.verdict.reward,
            )
            if example.length > self.max_positions:  # contexts of other texts than y have no bound beforehand
                num_too_long += 1
            else:
                examples.append(example)
        self._log("teacher", {"too_long": num_too_long})
        return examples

    def counts(self, examples: Sequence[Example]) -> list[int]:
        """Target tokens, responses, and target tokens of the responses with reward 0 and 1."""
        by_reward = [sum(len(e.target) for e in examples if e.reward == r) for r in (0, 1)]
        return [sum(by_reward), len(examples), *by_reward]

    def num_trained(self, examples: Sequence[Example]) -> int:
        return 2 * sum(len(e.target) for e in examples)  # the student's pass and the teacher's

    def loss(self, examples: Sequence[Example], counts: Sequence[float]) -> LossOutput:
        targets = [e.target for e in examples]
        student_batch = collate([e.context for e in examples], targets, self.builder.pad_id).to(self.device)
        teacher_batch = collate([e.teacher_context for e in examples], targets, self.builder.pad_id).to(self.device)
        weights = torch.cat([torch.full((len(e.target),), e.weight) for e in examples]).to(self.device)
        num = counts[0] if self.reduction == "token_mean" else counts[1]
        with torch.no_grad():
            teacher = self.teacher(teacher_batch.input_ids, teacher_batch.predicts, hidden_teacher)

        def head(hidden: Tensor, weight: Tensor) -> LossOutput:
            return divergence_head(
                hidden, weight, teacher, weights, num, self.divergence, targets=student_batch.targets
            )

        output = self.student(student_batch.input_ids, student_batch.predicts, head)
        return LossOutput(output.loss, self._metrics(examples, output.metrics, counts))

    def _metrics(
        self, examples: Sequence[Example], per_token: dict[str, Tensor], counts: Sequence[float]
    ) -> dict[str, Tensor]:
        """Means over tokens, by reward, nan without any: Lightning would log the step before's value again.

        `token_kl_reward` is positive where the reviser would take the token back.
        """
        rewards = torch.tensor([-1 if e.reward is None else e.reward for e in examples for _ in e.target])
        token_kl_reward = per_token["student_logprobs"] - per_token["teacher_logprobs"]
        metrics = {}
        for reward, num in zip((0, 1), counts[2:], strict=True):
            chosen = (rewards == reward).to(token_kl_reward.device)
            metrics[f"teacher/kl_r{reward}"] = per_token["divergence"][chosen].sum() / (num or math.nan)
            metrics[f"teacher/token_kl_reward_r{reward}"] = token_kl_reward[chosen].sum() / (num or math.nan)
        if "top_k_mass" in per_token:
            chosen = (rewards >= 0).to(token_kl_reward.device)
            metrics["teacher/top_k_mass"] = per_token["top_k_mass"][chosen].sum() / counts[0]
        return metrics
