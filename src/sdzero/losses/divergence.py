"""Divergence of the student from the teacher (equation 4) from hidden states.

Legend: N target tokens, V vocabulary, K top-k, H hidden, C tokens of a chunk. All values are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sdzero.losses import matmul, row_ops
from sdzero.losses.fused_linear import Columns, Projection, chunked_head
from sdzero.losses.soft_targets import HiddenTargets, SoftTargets, TopKTargets, check_top_k
from sdzero.types import LossOutput

Kind = Literal["reverse", "forward", "mixed", "jsd"]
Support = Literal["teacher", "student"]
Outside = Literal["renormalize", "tail"]


@dataclass(frozen=True)
class Divergence:
    """Divergence of the student S from the teacher T (equation 4; table 6 for the top-k form).

    Args:
        kind: reverse is KL(S||T), equation 4; forward is KL(T||S); mixed is weight * forward + (1 - weight) * reverse;
            jsd is weight * KL(T||M) + (1 - weight) * KL(S||M) with M = weight * T + (1 - weight) * S.
        weight: share of the forward KL in mixed, in [0, 1]; share of the teacher in jsd, in (0, 1). Else unused.
        top_k: number of tokens compared at each position; null compares the whole vocabulary.
        support: model whose likeliest top_k tokens are compared. No gradient flows through the choice.
        outside: treatment of the tokens outside the support. renormalize: both distributions are renormalised
            inside it (table 6's "zero outside top-K: False"); tail: one more bucket holds the rest of each.
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
        check_top_k(self.top_k)
        if self.top_k is None and (self.support, self.outside) != ("teacher", "renormalize"):
            raise ValueError("support and outside need a top_k: set top_k, or leave both at their defaults")


def divergence_head(
    hidden: Tensor,
    weight: Tensor,
    teacher: SoftTargets,
    token_weights: Tensor,
    num_tokens: float | Tensor,
    divergence: Divergence,
    targets: Tensor | None = None,
    chunk_size: int | None = None,
) -> LossOutput:
    """Compute sum(token_weights * D(student, teacher)) / num_tokens.

    Args:
        hidden: [N, H], the student's last hidden states; N may be 0.
        weight: [V, H], the student's LM head; dtypes as in `cross_entropy_head`.
        teacher: the teacher at the same N positions; detached.
        token_weights: [N].
        num_tokens: divisor of the sum, counted over all ranks and micro batches.
        divergence: the divergence D.
        targets: [N] int64, the sampled tokens y_t, for the metrics only: they cost no projection of the student.
        chunk_size: as in `cross_entropy_head`.

    Returns:
        The loss, differentiable once in `hidden` and `weight`. Metrics, each [N] and detached: `divergence`; with
        top_k `top_k_mass`, the teacher's mass inside the support; the log-probabilities of y_t over the whole
        vocabulary: `teacher_logprobs`, given targets and HiddenTargets or stored in TopKTargets, and, given targets,
        `student_logprobs` unless a renormalised top-k of the teacher needs only those K logits of the student.

    Raises:
        ValueError: the teacher cannot serve the divergence, top_k exceeds the vocabulary, the vocabularies differ, or
            chunk_size or num_tokens is not positive.
    """
    _check_teacher(divergence, teacher, len(hidden), len(weight))
    if divergence.top_k == len(weight):
        divergence = replace(divergence, outside="renormalize")  # nothing is outside
    dtype = matmul.result_dtype(hidden, weight)
    whole = divergence.top_k in (None, len(weight))
    projects = whole or divergence.support == "student" or divergence.outside != "renormalize"
    available = {
        "top_k_mass": divergence.top_k is not None,
        "student_logprobs": targets is not None and projects,
        "teacher_logprobs": targets is not None and isinstance(teacher, HiddenTargets),
    }
    metrics = {name: torch.zeros_like(token_weights, dtype=dtype) for name, given in available.items() if given}
    source = teacher
    if isinstance(source, HiddenTargets):
        source = Projection(source.hidden, source.weight, matmul.chunk_size(chunk_size, hidden), dtype)
    elif source.target_logprobs is not None:
        metrics["teacher_logprobs"] = source.target_logprobs.detach().to(dtype)
    comparison = _Comparison(divergence, source, projects, targets, metrics)
    body = comparison.whole if divergence.top_k is None else comparison.top_k
    loss, values = chunked_head(hidden, weight, token_weights, num_tokens, body, chunk_size)
    return LossOutput(loss, {"divergence": values, **metrics})


def _check_teacher(divergence: Divergence, teacher: SoftTargets, num_rows: int, vocab: int) -> None:
    check_top_k(divergence.top_k, vocab)
    if isinstance(teacher, HiddenTargets):
        assert len(teacher.hidden) == num_rows, "student and teacher must hold the same positions"
        if len(teacher.weight) != vocab:
            raise ValueError(
                f"teacher: its vocabulary has {len(teacher.weight)} entries and the student's {vocab}; "
                "cut both heads to their shared tokens"
            )
        return
    assert teacher.ids.shape == teacher.logprobs.shape and len(teacher.ids) == num_rows
    check_top_k(divergence.top_k, teacher.ids.shape[1], "the teacher's stored top-k")
    if divergence.top_k is None or divergence.support != "teacher":
        raise ValueError("a teacher stored as its top-k needs a top_k and support=teacher; else store hidden states")


@dataclass(frozen=True)
class _Comparison:
    """Divergence of a chunk's positions and its gradient, the body of `chunked_head`; writes their metrics."""

    divergence: Divergence
    teacher: Projection | TopKTargets
    projects: bool  # the student onto the whole vocabulary
    targets: Tensor | None
    metrics: dict[str, Tensor]

    def whole(self, student: Projection, rows: slice, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compare over the whole vocabulary."""
        assert isinstance(self.teacher, Projection)
        teacher_logits = self.teacher.logits(rows)
        targets = None if self.targets is None else self.targets[rows]
        kind, share, dtype = self.divergence.kind, self.divergence.weight, student.operands
        values, grad, target_logprobs = row_ops.divergence(
            kind, share, student.logits(rows), teacher_logits, targets, scale, dtype
        )
        for name, logprobs in zip(("student_logprobs", "teacher_logprobs"), target_logprobs, strict=False):
            self.metrics[name][rows] = logprobs
        return values, grad

    def top_k(self, student: Projection, rows: slice, scale: Tensor | None) -> tuple[Tensor, Tensor | Columns | None]:
        """Compare over top_k tokens per position and, for tail, one bucket of all the others."""
        log_s = student.log_probs(rows) if self.projects else None
        if log_s is not None and self.targets is not None:
            self.metrics["student_logprobs"][rows] = row_ops.gather_targets(log_s, self.targets[rows])
        ids, inside_t, rest_t = self._teacher_support(rows, log_s, student.dtype)
        kind, share = self.divergence.kind, self.divergence.weight
        if log_s is not None and rest_t is not None:
            buckets_t = torch.cat([inside_t, rest_t], -1).log_softmax(-1)
            return row_ops.divergence_with_rest(kind, share, log_s, ids, buckets_t, scale)
        inside_s = student.columns(rows, ids) if log_s is None else log_s.gather(1, ids)
        log_s, log_t = inside_s.log_softmax(-1), inside_t.log_softmax(-1)
        values, grad = row_ops.divergence_of_log_probs(kind, share, log_s, log_t, scale is not None)
        return values, None if grad is None or scale is None else Columns(ids, grad * scale[:, None])

    def _teacher_support(
        self, rows: slice, log_s: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the support's ids [C, K], the teacher's log-probabilities [C, K] and, for tail, of the rest [C, 1]."""
        top_k, is_tail, rest = self.divergence.top_k, self.divergence.outside == "tail", None
        assert top_k is not None
        if isinstance(self.teacher, TopKTargets):
            ids, inside = self.teacher.ids[rows], self.teacher.logprobs[rows].detach().to(dtype)
            if ids.shape[1] > top_k:
                inside, order = inside.topk(top_k, sorted=False)
                ids = ids.gather(1, order)
            mass = inside.exp().sum(-1, keepdim=True)
            if is_tail:  # a difference from 1 is only known to the precision of 1
                rest = (1 - mass).clamp_min(torch.finfo(dtype).eps).log()
        else:
            log_t = self.teacher.log_probs(rows)
            if self.targets is not None:
                self.metrics["teacher_logprobs"][rows] = row_ops.gather_targets(log_t, self.targets[rows])
            chooser = log_t if self.divergence.support == "teacher" else log_s
            assert chooser is not None
            ids = chooser.topk(top_k, sorted=False).indices
            inside = log_t.gather(1, ids)
            mass = inside.exp().sum(-1, keepdim=True)
            if is_tail:
                rest = row_ops.split_rest(log_t, ids)
        self.metrics["top_k_mass"][rows] = mass.squeeze(1)
        return ids, inside, rest
