"""Phase 2, on-policy self-distillation (section 2.2, equation 4), and its relatives by other teacher contexts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

from sdzero.losses import Divergence, check_top_k, divergence_head
from sdzero.losses.soft_targets import HiddenTargets, SoftTargets, TopKTargets, hidden_targets, top_k_targets
from sdzero.methods.base import Method
from sdzero.methods.batching import collate
from sdzero.models.language_model import ModelConfig, load
from sdzero.models.lora import AdaptersOff, check_strategy
from sdzero.models.parallelize import check_tensor_parallel
from sdzero.models.weights import lerp_weights
from sdzero.prompts import Context, Revision
from sdzero.types import Example, LossOutput, RolloutBatch, ScoredRollout
from sdzero.utils.seeds import run_seed


class SelfDistill(Method):
    """The student answers; the teacher, shown what `context` builds, gives a distribution at every token of that
    same answer; the student minimises the divergence to it.

    Args:
        context: what the teacher reads before y. SD-Zero: `Revision`.
        divergence: which divergence, on which support.
        teacher: another model as teacher; null takes a frozen copy of the student as it starts, or where the student
            has adapters (`student.lora`) no copy at all: the student with its adapters switched off. The callback
            TeacherSync copies or averages the student into a teacher that is a model of its own.
        mask_truncated: leave responses that were cut at the token limit out of the loss.
        teacher_first: run the teacher over all micro batches of a step before the student's first. What the loss
            needs of it (its last hidden states, or its top_k) waits in host memory, and so do the teacher's weights
            until they are needed again. Off, each micro batch has its teacher's pass just before its own: the less
            work of the two, for where the teacher fits beside the student's training.
        kwargs: as in Method.
    """

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
        self.context = context
        self.divergence = divergence
        self.teacher_config: ModelConfig = teacher or self.student_config
        self.shares_base = teacher is None and self.student_config.lora is not None
        self.mask_truncated = mask_truncated
        self.teacher_first = teacher_first
        self.teacher_generation = 0
        theirs = self.teacher_config.hf_config()
        self.max_positions = min(self.max_positions, getattr(theirs, "max_position_embeddings", None) or 2**31)
        vocab_size = self.hf_config.vocab_size
        check_top_k(divergence.top_k, vocab_size)
        if theirs.vocab_size != vocab_size:
            raise ValueError(f"teacher.path: its vocabulary has {theirs.vocab_size} tokens, the student's {vocab_size}")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_strategy(self.teacher_config.lora, self.teacher_config.dtype, self.trainer.strategy)
        check_tensor_parallel(self.teacher_config.hf_config(), self.share.num_members)

    def configure_model(self) -> None:
        super().configure_model()
        if hasattr(self, "teacher"):
            return
        self.teacher: Any  # a module, or what calls the student's
        if self.shares_base:
            self.teacher = AdaptersOff(self.student)
        else:
            teacher = load(self.teacher_config, run_seed()).requires_grad_(False)
            self.teacher = self.shard(teacher, self.teacher_config).eval()
            # DDP is to leave it alone: every rank has read it, and it may lie on another device than the student
            tensors = (*teacher.named_parameters(), *teacher.named_buffers())
            self._ddp_params_and_buffers_to_ignore = [f"teacher.{name}" for name, _ in tensors]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._move_teacher(self.device)  # a GPU's collectives, which gather its shards, need it there
        return super().state_dict(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sdzero"]["teacher_generation"] = self.teacher_generation

    def reviser(self) -> tuple[Callable[..., Any], Context]:
        self._move_teacher(self.device)
        return self.teacher, self.context

    def update_teacher(self, weight: float = 1.0) -> None:
        """teacher += weight * (student - teacher); 1.0 synchronises and starts a new generation."""
        assert not self.shares_base
        self._move_teacher(self.device)
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
                logprobs=rollout.logprobs,
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

    @property
    def packed(self) -> bool:
        return super().packed and self.teacher_config.packs

    def prepare(self, batches: Sequence[Sequence[Example]]) -> Iterable[SoftTargets]:
        """The teacher at every target token of each micro batch."""
        if self.teacher_first:
            return self._teach_first(batches)
        return map(self._teach, batches)

    @torch.no_grad()
    def _teach(self, examples: Sequence[Example]) -> SoftTargets:
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
        """Whether the teacher's top_k is all that the loss needs of it, to the last digit; its head can go then."""
        exact = self.divergence.support == "teacher" and self.divergence.outside != "tail"
        return self.teacher_first and self.divergence.top_k is not None and exact

    def _teach_first(self, batches: Sequence[Sequence[Example]]) -> Iterator[SoftTargets]:
        self._move_teacher(self.device)
        waiting: list[SoftTargets] = []
        weight: Tensor | None = None
        for examples in batches:
            teacher = self._teach(examples)
            if isinstance(teacher, HiddenTargets) and self._teacher_moves:
                weight = teacher.weight.clone() if weight is None else weight  # the head stays when the rest goes
                teacher = HiddenTargets(teacher.hidden, weight)
            waiting.append(_to_host(teacher))
        self._move_teacher(torch.device("cpu"))
        return (_to_device(teacher, self.device) for teacher in waiting)

    @property
    def _teacher_moves(self) -> bool:
        """Whether the teacher's weights can leave the device: the student's own and FSDP1's cannot, and `cpu_offload`
        moves them itself."""
        if not self.teacher_first or self.shares_base or self.device.type == "cpu":
            return False
        return not isinstance(self.teacher, FSDP1) and not self.teacher_config.cpu_offload

    def _move_teacher(self, device: torch.device) -> None:
        if self._teacher_moves:
            self.teacher.to(device)

    def loss(
        self, examples: Sequence[Example], counts: Sequence[float], prepared: SoftTargets | None = None
    ) -> LossOutput:
        teacher = self._teach(examples) if prepared is None else prepared
        contexts, targets = [e.context for e in examples], [e.target for e in examples]
        batch = collate(contexts, targets, self.builder.pad_id, self.packed).to(self.device)
        weights = torch.cat([torch.full((len(e.target),), e.weight) for e in examples]).to(self.device)
        num = counts[0] if self.reduction == "token_mean" else counts[1]

        def head(hidden: Tensor, weight: Tensor) -> LossOutput:
            return divergence_head(hidden, weight, teacher, weights, num, self.divergence, targets=batch.targets)

        output = self.student(batch.input_ids, batch.predicts, head, batch.position_ids)
        return LossOutput(output.loss, self._metrics(examples, output.metrics, counts))

    def _metrics(
        self, examples: Sequence[Example], per_token: dict[str, Tensor], counts: Sequence[float]
    ) -> dict[str, Tensor]:
        """Means over tokens, by reward, nan without any: Lightning would log the step before's value again.

        `token_kl_reward` is positive where the reviser would take the token back.
        """
        rewards = torch.tensor([-1 if e.reward is None else e.reward for e in examples for _ in e.target])
        ours = per_token.get("student_logprobs")
        if ours is None:  # of the same weights, from the engine: the loss needed none over the whole vocabulary
            ours = torch.tensor([value for e in examples for value in e.logprobs], device=self.device)
        token_kl_reward = ours - per_token["teacher_logprobs"]
        metrics = {}
        for reward, num in zip((0, 1), counts[2:], strict=True):
            chosen = (rewards == reward).to(token_kl_reward.device)
            metrics[f"teacher/kl_r{reward}"] = per_token["divergence"][chosen].sum() / (num or math.nan)
            metrics[f"teacher/token_kl_reward_r{reward}"] = token_kl_reward[chosen].sum() / (num or math.nan)
        if "top_k_mass" in per_token:
            chosen = (rewards >= 0).to(token_kl_reward.device)
            metrics["teacher/top_k_mass"] = per_token["top_k_mass"][chosen].sum() / counts[0]
        return metrics


def _to_host(teacher: SoftTargets) -> SoftTargets:
    """All but the head in pinned host memory."""

    def moved(tensor: Tensor) -> Tensor:
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    return _mapped(teacher, lambda tensor: moved(tensor) if tensor.is_cuda else tensor)


def _to_device(teacher: SoftTargets, device: torch.device) -> SoftTargets:
    return _mapped(teacher, lambda tensor: tensor.to(device, non_blocking=True))


def _mapped(teacher: SoftTargets, move: Callable[[Tensor], Tensor]) -> SoftTargets:
    if isinstance(teacher, HiddenTargets):
        return HiddenTargets(move(teacher.hidden), teacher.weight)
    logprobs = None if teacher.target_logprobs is None else move(teacher.target_logprobs)
    return TopKTargets(move(teacher.ids), move(teacher.logprobs), logprobs)
