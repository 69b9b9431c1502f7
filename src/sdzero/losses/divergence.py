"""The losses: weighted cross-entropy and the divergence of student from teacher, both from hidden states.

Legend: N target tokens, V vocabulary, K top-k, H hidden, C tokens of a chunk. All values are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sdzero.losses import fused_linear, matmul, row_ops
from sdzero.losses.fused_linear import Columns, Projection
from sdzero.losses.soft_targets import HiddenTeacher, Teacher, TopKTeacher, check_top_k
from sdzero.types import LossOutput

Kind = Literal["reverse", "forward", "mixed", "jsd"]
Support = Literal["teacher", "student"]
Outside = Literal["renormalize", "tail", "student_full"]

# student_full reads the teacher's zero outside its support as this log-probability: a KL from a true 0 is infinite.
LOG_ZERO = -100.0


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
    chunk_size: int | None = None,
) -> LossOutput:
    """sum(token_weights * -log p(targets)) / num_tokens (equations 1 to 3).

    Args:
        hidden: [N, H], last hidden states; N may be 0.
        weight: [V, H], the head. On CUDA it meets `hidden` in the dtype of autocast, or of `hidden`; the logits and all
            that comes of them are float32 whatever the dtypes and autocast are.
        targets: [N] int64.
        token_weights: [N].
        num_tokens: what the sum is divided by, counted over all ranks and micro batches.
        chunk_size: tokens whose logits exist at once; None is 2,048 on CUDA and 256 elsewhere.

    Returns:
        The loss, differentiable once in `hidden` and `weight`; metrics `logprobs` [N], log p(targets).

    Raises:
        ValueError: chunk_size or num_tokens is not positive.
    """
    dtype, chunk_size = matmul.result_dtype(hidden, weight), matmul.chunk_size(chunk_size, hidden)
    scale = _scale(token_weights, num_tokens, dtype)

    def body(student: Projection, rows: slice, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return row_ops.cross_entropy(student.logits(rows), targets[rows], scale, student.operands)

    loss, values = fused_linear.chunked_head(hidden, weight, scale, body, chunk_size, dtype)
    return LossOutput(loss, {"logprobs": -values})


def divergence_head(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    token_weights: Tensor,
    num_tokens: float | Tensor,
    divergence: Divergence,
    targets: Tensor | None = None,
    chunk_size: int | None = None,
) -> LossOutput:
    """sum(token_weights * D(student, teacher)) / num_tokens (equation 4).

    Args:
        hidden: [N, H], the student's last hidden states; N may be 0.
        weight: [V, H], the student's head; dtypes as in `cross_entropy_head`.
        teacher: the same N positions of the teacher; detached.
        token_weights: [N].
        num_tokens: what the sum is divided by, counted over all ranks and micro batches.
        divergence: which D.
        targets: [N] int64, the sampled tokens y_t, for the metrics alone: they never make the student be projected.
        chunk_size: as in `cross_entropy_head`.

    Returns:
        The loss, differentiable once in `hidden` and `weight`. Metrics, each [N] and detached: `divergence`; with
        top_k `top_k_mass`, the teacher's mass inside the support; of y_t over the whole vocabulary `teacher_logprobs`,
        with targets and a HiddenTeacher or as a TopKTeacher stored them, and, with targets, `student_logprobs` unless
        a renormalised top-k of the teacher's choice needs no more of the student than those K logits.

    Raises:
        ValueError: the teacher cannot serve the divergence, top_k exceeds the vocabulary, the vocabularies differ, or
            chunk_size or num_tokens is not positive.
    """
    _check_teacher(divergence, teacher, len(hidden), len(weight))
    dtype, chunk_size = matmul.result_dtype(hidden, weight), matmul.chunk_size(chunk_size, hidden)
    scale = _scale(token_weights, num_tokens, dtype)
    metrics = {} if divergence.top_k is None else {"top_k_mass": torch.zeros_like(scale)}
    few = divergence.top_k not in (None, len(weight)) and divergence.support == "teacher"
    projects = not few or divergence.outside != "renormalize"  # the student, onto the whole vocabulary
    if targets is not None and projects:
        metrics["student_logprobs"] = torch.zeros_like(scale)
    if targets is not None and isinstance(teacher, HiddenTeacher):
        metrics["teacher_logprobs"] = torch.zeros_like(scale)
    if isinstance(teacher, TopKTeacher) and teacher.target_logprobs is not None:
        metrics["teacher_logprobs"] = teacher.target_logprobs.detach().to(dtype)
    if divergence.top_k == len(weight):
        divergence = replace(divergence, outside="renormalize")  # nothing is outside
    source = teacher
    if isinstance(source, HiddenTeacher):
        source = Projection(source.hidden, source.weight, chunk_size, dtype)
    if divergence.top_k is None:
        assert isinstance(source, Projection)
        body = _FullBody(divergence, source, targets, metrics)
    else:
        body = _TopKBody(divergence, divergence.top_k, source, projects, targets, metrics)
    loss, values = fused_linear.chunked_head(hidden, weight, scale, body, chunk_size, dtype)
    return LossOutput(loss, {"divergence": values, **metrics})


def _scale(token_weights: Tensor, num_tokens: float | Tensor, dtype: torch.dtype) -> Tensor:
    count = float(num_tokens)
    if len(token_weights) and not count > 0:
        raise ValueError(f"num_tokens must be positive where there are tokens, got {count}: count the global batch")
    return token_weights.detach().to(dtype) / count


def _check_teacher(divergence: Divergence, teacher: Teacher, num_rows: int, vocab: int) -> None:
    top_k = divergence.top_k
    if top_k is not None:
        check_top_k(top_k, vocab)
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
    """Compares the whole vocabulary."""

    divergence: Divergence
    teacher: Projection
    targets: Tensor | None
    metrics: dict[str, Tensor]

    def __call__(self, student: Projection, rows: slice, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        teacher_logits = self.teacher.logits(rows)
        targets = None if self.targets is None else self.targets[rows]
        of, dtype = self.divergence, student.operands
        values, grad, of_targets = row_ops.divergence(
            of.kind, of.weight, student.logits(rows), teacher_logits, targets, scale, dtype
        )
        for name, metric in zip(("student_logprobs", "teacher_logprobs"), of_targets, strict=False):
            self.metrics[name][rows] = metric
        return values, grad


@dataclass(frozen=True)
class _TopKBody:
    """Compares top_k tokens a position and, unless renormalised, the bucket of all the others."""

    divergence: Divergence
    top_k: int
    teacher: Projection | TopKTeacher
    projects: bool
    targets: Tensor | None
    metrics: dict[str, Tensor]

    def __call__(
        self, student: Projection, rows: slice, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | Columns | None]:
        log_s = student.log_probs(rows) if self.projects else None
        if log_s is not None and self.targets is not None:
            self.metrics["student_logprobs"][rows] = row_ops.of_targets(log_s, self.targets[rows])
        ids, inside_t, rest_t = self._teacher_support(rows, log_s, student.dtype)
        kind, share = self.divergence.kind, self.divergence.weight
        if log_s is not None and self.divergence.outside != "renormalize":
            if rest_t is None:
                buckets_t = torch.nn.functional.pad(inside_t.log_softmax(-1), (0, 1), value=LOG_ZERO)
            else:
                buckets_t = torch.cat([inside_t, rest_t], -1).log_softmax(-1)
            return row_ops.compare_with_rest(kind, share, log_s, ids, buckets_t, rest_t is None, scale)
        inside_s = student.columns(rows, ids) if log_s is None else log_s.gather(1, ids)
        log_s, log_t = inside_s.log_softmax(-1), inside_t.log_softmax(-1)
        values, grad = row_ops.compare(kind, share, log_s, log_t, scale is not None)
        return values, None if grad is None or scale is None else Columns(ids, grad * scale[:, None])

    def _teacher_support(
        self, rows: slice, log_s: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The support's ids [C, K], the teacher's log-probabilities there [C, K] and, for tail, of the rest [C, 1]."""
        if isinstance(self.teacher, TopKTeacher):
            ids, inside = self.teacher.ids[rows], self.teacher.logprobs[rows].detach().to(dtype)
            if ids.shape[1] > self.top_k:
                inside, order = inside.topk(self.top_k, sorted=False)
                ids = ids.gather(1, order)
            mass = inside.exp().sum(-1, keepdim=True)
            # A difference from 1 is only known to the precision of 1.
            rest = (1 - mass).clamp_min(torch.finfo(dtype).eps).log() if self.divergence.outside == "tail" else None
        else:
            log_t = self.teacher.log_probs(rows)
            if self.targets is not None:
                self.metrics["teacher_logprobs"][rows] = row_ops.of_targets(log_t, self.targets[rows])
            by = log_t if self.divergence.support == "teacher" else log_s
            assert by is not None
            ids = by.topk(self.top_k, sorted=False).indices
            inside = log_t.gather(1, ids)
            mass = inside.exp().sum(-1, keepdim=True)
            rest = row_ops.split_off(log_t, ids) if self.divergence.outside == "tail" else None
        self.metrics["top_k_mass"][rows] = mass.squeeze(1)
        return ids, inside, rest
