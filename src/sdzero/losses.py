"""The losses: weighted cross-entropy and the divergence of student from teacher, both from hidden states.

Legend: N target tokens, V vocabulary, K top-k, H hidden, C tokens of a chunk. All values are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sdzero import fused
from sdzero.fused import Columns, Projection
from sdzero.types import LossOutput

Kind = Literal["reverse", "forward", "mixed", "jsd"]
Support = Literal["teacher", "student"]
Outside = Literal["renormalize", "tail", "student_full"]

CHUNK_SIZE = 256
# student_full reads the teacher's zero outside its support as this log-probability: a KL from a true 0 is infinite.
LOG_ZERO = -100.0


@dataclass(frozen=True)
class HiddenTeacher:
    """The teacher as its last hidden states [N, Ht] and its head [V, Ht]: exact. No gradient flows into either."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TopKTeacher:
    """The teacher as its K likeliest tokens: `ids` [N, K] int64, `logprobs` [N, K] over the whole vocabulary (not
    renormalised), in any order."""

    ids: Tensor
    logprobs: Tensor


Teacher = HiddenTeacher | TopKTeacher


def hidden_teacher(hidden: Tensor, weight: Tensor) -> HiddenTeacher:
    """A head that keeps what a teacher's pass gives. The class itself will not do: sharded models take a dataclass
    among their inputs, even the class of one, for a container of tensors, and rebuild it."""
    return HiddenTeacher(hidden, weight)


@dataclass(frozen=True)
class Divergence:
    """Which divergence of the student S from the teacher T is minimised (equation 4; table 6 for the top-k form).

    Args:
        kind: reverse is KL(S||T), equation 4; forward is KL(T||S); mixed is weight * forward + (1 - weight) * reverse;
            jsd is weight * KL(T||M) + (1 - weight) * KL(S||M) with M = weight * T + (1 - weight) * S.
        weight: the forward KL's share in mixed, in [0, 1]; the teacher's share in jsd, in (0, 1). Else unused.
        top_k: tokens of the vocabulary that are compared at each position; null compares all of them.
        support: whose likeliest top_k tokens are compared. No gradient flows through the choice.
        outside: what becomes of the tokens outside the support. renormalize: both distributions are renormalised
            inside it (table 6's "zero outside top-K: False"); tail: one more bucket holds the rest of each;
            student_full: the teacher is renormalised inside and counts as exp(-100) on every token outside, the student
            is normalised over the whole vocabulary ("True").
    """

    kind: Kind = "reverse"
    weight: float = 0.5
    top_k: int | None = None
    support: Support = "teacher"
    outside: Outside = "renormalize"

    def __post_init__(self) -> None:
        for name, choices in (("kind", Kind), ("support", Support), ("outside", Outside)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight}")
        if self.kind == "jsd" and self.weight in (0, 1):
            raise ValueError(
                f"weight must lie inside (0, 1) for jsd, which is 0 at {self.weight}: use forward or reverse"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or null for the whole vocabulary, got {self.top_k}")
        if self.top_k is None and (self.support, self.outside) != ("teacher", "renormalize"):
            raise ValueError("support and outside need a top_k: set top_k, or leave both at their defaults")


def cross_entropy_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    num_tokens: float | Tensor,
    chunk_size: int = CHUNK_SIZE,
) -> LossOutput:
    """sum(token_weights * -log p(targets)) / num_tokens (equations 1 to 3).

    Args:
        hidden: [N, H], last hidden states; N may be 0.
        weight: [V, H], the head. The softmax is taken in float32 whatever the dtypes and autocast are.
        targets: [N] int64.
        token_weights: [N].
        num_tokens: what the sum is divided by, counted over all ranks and micro batches.
        chunk_size: tokens whose logits exist at once.

    Returns:
        The loss, differentiable once in `hidden` and `weight`; metrics `logprobs` [N], log p(targets).

    Raises:
        ValueError: chunk_size or num_tokens is not positive.
    """
    dtype = _dtype(hidden, weight)
    scale = _scale(token_weights, num_tokens, chunk_size, dtype)

    def body(student: Projection, rows: slice, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits, column = student.logits(rows), targets[rows, None]
        values = logits.new_empty(len(logits))
        for block in fused.row_blocks(logits):
            log_probs = logits[block].log_softmax(-1)
            values[block] = -log_probs.gather(1, column[block]).squeeze(1)
            if scale is not None:
                torch.mul(log_probs.exp_(), scale[block, None], out=logits[block])
        if scale is None:
            return values, None
        return values, logits.scatter_add_(1, column, -scale[:, None])

    loss, values = fused.chunked_head(hidden, weight, scale, body, chunk_size, dtype)
    return LossOutput(loss, {"logprobs": -values})


def divergence_head(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    token_weights: Tensor,
    num_tokens: float | Tensor,
    divergence: Divergence,
    targets: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> LossOutput:
    """sum(token_weights * D(student, teacher)) / num_tokens (equation 4).

    Args:
        hidden: [N, H], the student's last hidden states; N may be 0.
        weight: [V, H], the student's head. The work is in float32 whatever the dtypes and autocast are.
        teacher: the same N positions of the teacher; detached.
        token_weights: [N].
        num_tokens: what the sum is divided by, counted over all ranks and micro batches.
        divergence: which D.
        targets: [N] int64, the sampled tokens y_t. Without them a renormalised top-k of the teacher's choice never
            projects the student onto the whole vocabulary.
        chunk_size: tokens whose logits exist at once.

    Returns:
        The loss, differentiable once in `hidden` and `weight`. Metrics, each [N] and detached: `divergence`; with
        targets `student_logprobs` and, of a HiddenTeacher, `teacher_logprobs`, both of y_t over the whole vocabulary;
        with top_k `top_k_mass`, the teacher's mass inside the support.

    Raises:
        ValueError: the teacher cannot serve the divergence, top_k exceeds the vocabulary, the vocabularies differ, or
            chunk_size or num_tokens is not positive.
    """
    _check_teacher(divergence, teacher, len(hidden), len(weight))
    dtype = _dtype(hidden, weight)
    scale = _scale(token_weights, num_tokens, chunk_size, dtype)
    metrics = {} if divergence.top_k is None else {"top_k_mass": torch.zeros_like(scale)}
    if targets is not None:
        names = ("student_logprobs", "teacher_logprobs")[: 2 if isinstance(teacher, HiddenTeacher) else 1]
        metrics |= {name: torch.zeros_like(scale) for name in names}
    if divergence.top_k == len(weight):
        divergence = replace(divergence, outside="renormalize")  # nothing is outside
    source = teacher
    if isinstance(source, HiddenTeacher):
        source = Projection(source.hidden, source.weight, chunk_size, dtype)
    if divergence.top_k is None:
        assert isinstance(source, Projection)
        body = _FullBody(divergence, source, targets, metrics)
    else:
        body = _TopKBody(divergence, divergence.top_k, source, targets, metrics)
    loss, values = fused.chunked_head(hidden, weight, scale, body, chunk_size, dtype)
    return LossOutput(loss, {"divergence": values, **metrics})


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _scale(token_weights: Tensor, num_tokens: float | Tensor, chunk_size: int, dtype: torch.dtype) -> Tensor:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    count = float(num_tokens)
    if len(token_weights) and not count > 0:
        raise ValueError(f"num_tokens must be positive where there are tokens, got {count}: count the global batch")
    return token_weights.detach().to(dtype) / count


def _check_teacher(divergence: Divergence, teacher: Teacher, num_rows: int, vocab: int) -> None:
    top_k = divergence.top_k
    if top_k is not None and top_k > vocab:
        raise ValueError(
            f"top_k must be at most the vocabulary's size {vocab}, got {top_k}: lower it or set it to null"
        )
    if isinstance(teacher, HiddenTeacher):
        assert len(teacher.hidden) == num_rows, "student and teacher must hold the same positions"
        if len(teacher.weight) != vocab:
            raise ValueError(
                f"teacher: its vocabulary has {len(teacher.weight)} entries and the student's {vocab}; "
                "cut both heads to their shared tokens"
            )
        return
    assert teacher.ids.shape == teacher.logprobs.shape and len(teacher.ids) == num_rows
    stored = teacher.ids.shape[1]
    if top_k is None or top_k > stored:
        raise ValueError(f"top_k must be at most the {stored} tokens this teacher stored, got {top_k}")
    if divergence.support != "teacher":
        raise ValueError("support must be teacher with a teacher stored as its top-k; student needs its hidden states")


@dataclass(frozen=True)
class _FullBody:
    """Compares the whole vocabulary, a few rows at a time in cache."""

    divergence: Divergence
    teacher: Projection
    targets: Tensor | None
    metrics: dict[str, Tensor]

    def __call__(self, student: Projection, rows: slice, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits, teacher_logits = student.logits(rows), self.teacher.logits(rows)
        values = logits.new_empty(len(logits))
        for block in fused.row_blocks(logits):
            log_s, log_t = logits[block].log_softmax(-1), teacher_logits[block].log_softmax(-1)
            if self.targets is not None:
                self.metrics["student_logprobs"][rows][block] = fused.of_targets(log_s, self.targets[rows][block])
                self.metrics["teacher_logprobs"][rows][block] = fused.of_targets(log_t, self.targets[rows][block])
            kind, share = self.divergence.kind, self.divergence.weight
            values[block], grad = fused.compare(kind, share, log_s, log_t, scale is not None)
            if grad is not None and scale is not None:
                torch.mul(grad, scale[block, None], out=logits[block])
        return values, None if scale is None else logits


@dataclass(frozen=True)
class _TopKBody:
    """Compares top_k tokens a position and, unless renormalised, the bucket of all the others."""

    divergence: Divergence
    top_k: int
    teacher: Projection | TopKTeacher
    targets: Tensor | None
    metrics: dict[str, Tensor]

    def __call__(
        self, student: Projection, rows: slice, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | Columns | None]:
        inside_only = self.divergence.outside == "renormalize"
        log_s = None
        if self.targets is not None or self.divergence.support == "student" or not inside_only:
            log_s = student.log_probs(rows)
            if self.targets is not None:
                self.metrics["student_logprobs"][rows] = fused.of_targets(log_s, self.targets[rows])
        ids, inside_t, rest_t = self._teacher_support(rows, log_s, student.dtype)
        kind, share = self.divergence.kind, self.divergence.weight
        if log_s is not None and not inside_only:
            if rest_t is None:
                buckets_t = torch.nn.functional.pad(inside_t.log_softmax(-1), (0, 1), value=LOG_ZERO)
            else:
                buckets_t = torch.cat([inside_t, rest_t], -1).log_softmax(-1)
            return fused.compare_with_rest(kind, share, log_s, ids, buckets_t, rest_t is None, scale)
        inside_s = student.columns(rows, ids) if log_s is None else log_s.gather(1, ids)
        log_s, log_t = inside_s.log_softmax(-1), inside_t.log_softmax(-1)
        values, grad = fused.compare(kind, share, log_s, log_t, scale is not None)
        return values, None if grad is None or scale is None else Columns(ids, grad * scale[:, None])

    def _teacher_support(
        self, rows: slice, log_s: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The support's ids [C, K], the teacher's log-probabilities there [C, K] and, for tail, of the rest [C, 1]."""
        if isinstance(self.teacher, TopKTeacher):
            inside, order = self.teacher.logprobs[rows].detach().to(dtype).topk(self.top_k, sorted=False)
            ids = self.teacher.ids[rows].gather(1, order)
            mass = inside.exp().sum(-1, keepdim=True)
            # A difference from 1 is only known to the precision of 1.
            rest = (1 - mass).clamp_min(torch.finfo(dtype).eps).log() if self.divergence.outside == "tail" else None
        else:
            log_t = self.teacher.log_probs(rows)
            if self.targets is not None:
                self.metrics["teacher_logprobs"][rows] = fused.of_targets(log_t, self.targets[rows])
            by = log_t if self.divergence.support == "teacher" else log_s
            assert by is not None
            ids = by.topk(self.top_k, sorted=False).indices
            inside = log_t.gather(1, ids)
            mass = inside.exp().sum(-1, keepdim=True)
            rest = fused.split_off(log_t, ids) if self.divergence.outside == "tail" else None
        self.metrics["top_k_mass"][rows] = mass.squeeze(1)
        return ids, inside, rest
