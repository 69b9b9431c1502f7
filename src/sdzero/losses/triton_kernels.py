"""Triton versions of row_ops.py for rows of the whole vocabulary, one program per row.

A first pass over a row keeps a running maximum, which gives log-sum-exp and both KL at once; a second pass writes the
gradient. Only jsd, whose mixture needs both log-sum-exp, reads the row once more in between.
"""

# ruff: noqa: ANN001, ANN202 (arguments of kernels are Triton's own values)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time
WARPS = 8
# Replaces -inf outside the row: its exp() is 0 too, but 0 times a difference of two of them is 0, not NaN.
LOWEST = tl.constexpr(-3.0e38)


def log_softmax_(logits: Tensor) -> Tensor:
    """Run `row_ops.log_softmax_` on float32 `logits` [C, V]."""
    _launch(_log_softmax, logits)
    return logits


def cross_entropy(
    logits: Tensor, targets: Tensor, scale: Tensor | None, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Run `row_ops.cross_entropy` on float32 `logits` [C, V]; a gradient of another dtype gets its own memory."""
    values, grad = logits.new_empty(len(logits)), _gradient(logits, scale, grad_dtype)
    _launch(_cross_entropy, logits, targets, _or(scale, values), values, _or(grad, logits), WITH_GRAD=grad is not None)
    return values, grad


def divergence(
    kind: str,
    share: float,
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None,
    scale: Tensor | None,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Run `row_ops.divergence` on float32 logits [C, V]; a gradient of another dtype gets its own memory."""
    values, grad = logits.new_empty(len(logits)), _gradient(logits, scale, grad_dtype)
    target_logprobs = [] if targets is None else [torch.empty_like(values), torch.empty_like(values)]
    assert teacher_logits.stride() == logits.stride()
    _launch(
        _divergence,
        logits,
        teacher_logits,
        _or(targets, values),
        _or(scale, values),
        values,
        *(target_logprobs or (values, values)),
        _or(grad, logits),
        {"reverse": 0.0, "forward": 1.0}.get(kind, share),
        JSD=kind == "jsd",
        REVERSE=kind in ("reverse", "mixed"),
        FORWARD=kind in ("forward", "mixed"),
        WITH_TARGETS=targets is not None,
        WITH_GRAD=grad is not None,
    )
    return values, grad, target_logprobs


def policy_gradient(
    logits: Tensor,
    targets: Tensor,
    token_loss: Any,
    temperature: float,
    entropy_coef: float,
    scale: Tensor | None,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Run `row_ops.policy_gradient` on float32 `logits` [C, V]; a gradient of another dtype gets its own memory."""
    logprobs, entropy, log_total = (logits.new_empty(len(logits)) for _ in range(3))
    inverse = 1.0 / temperature
    _launch(_target_statistics, logits, targets, logprobs, entropy, log_total, inverse)
    values, slopes = token_loss(logprobs, entropy, slice(None))
    grad = _gradient(logits, scale, grad_dtype)
    if grad is not None and scale is not None:
        factors = (scale * slopes * inverse, scale * (entropy_coef * inverse))
        _launch(_policy_gradient, logits, targets, log_total, entropy, *factors, grad, inverse)
    return values, grad


def _gradient(logits: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if scale is None:
        return None
    return logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Return `tensor`, or for None a placeholder that the kernel does not touch."""
    return unused if tensor is None else tensor


def _launch(kernel: Any, rows: Tensor, *args: Any, **constants: bool) -> None:
    assert rows.is_contiguous() and rows.dtype == torch.float32
    with torch.cuda.device_of(rows):
        sizes = (rows.shape[1], rows.stride(0))  # vocab, stride
        kernel[(len(rows),)](rows, *args, *sizes, **constants, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)


@triton.jit
def _log_sum_exp(row, vocab, BLOCK: tl.constexpr):
    """Compute the row's maximum and log(sum(exp(x - maximum)))."""
    top, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < vocab, other=LOWEST)
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
        top = new_top
    return top, tl.log(total)


@triton.jit
def _log_softmax(logits, vocab, stride, BLOCK: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * stride
    top, log_total = _log_sum_exp(row, vocab, BLOCK)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < vocab, other=LOWEST)
        tl.store(row + columns, x - top - log_total, mask=columns < vocab)


@triton.jit
def _cross_entropy(logits, targets, scale, values, grad, vocab, stride, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    target = tl.load(targets + index)
    at_target = tl.load(row + target)  # before its place may be taken by the gradient
    top, log_total = _log_sum_exp(row, vocab, BLOCK)
    tl.store(values + index, log_total - (at_target - top))
    if WITH_GRAD:
        factor = tl.load(scale + index)
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(row + columns, mask=columns < vocab, other=LOWEST)
            probs = tl.exp(x - top - log_total)
            slope = factor * tl.where(columns == target, probs - 1.0, probs)
            tl.store(grad + index * stride + columns, slope, mask=columns < vocab)


@triton.jit
def _target_statistics(logits, targets, logprobs, entropy, log_total, inverse, vocab, stride, BLOCK: tl.constexpr):
    """Write log p(target), the entropy and log(sum(exp(x))) of x = logits * inverse."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    at_target = tl.load(row + tl.load(targets + index)) * inverse
    top, total, moment = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < vocab
        x = tl.where(is_inside, tl.load(row + columns, mask=is_inside, other=0.0) * inverse, LOWEST)
        new_top = tl.maximum(top, tl.max(x, 0))
        kept, weights = tl.exp(top - new_top), tl.exp(x - new_top)
        # sum of weight times (x - top), rescaled as the maximum moves
        moment = kept * (moment + total * (top - new_top)) + tl.sum(weights * (x - new_top), 0)
        total = kept * total + tl.sum(weights, 0)
        top = new_top
    tl.store(logprobs + index, at_target - top - tl.log(total))
    tl.store(entropy + index, tl.log(total) - moment / total)
    tl.store(log_total + index, top + tl.log(total))


@triton.jit
def _policy_gradient(
    logits, targets, log_total, entropy, slope, bonus, grad, inverse, vocab, stride, BLOCK: tl.constexpr
):
    """Write slope * (1_y - p) + bonus * p * (log p + H)."""
    index = tl.program_id(0).to(tl.int64)
    row, target = logits + index * stride, tl.load(targets + index)
    total, mean = tl.load(log_total + index), tl.load(entropy + index)
    factor, weight = tl.load(slope + index), tl.load(bonus + index)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_probs = tl.load(row + columns, mask=columns < vocab, other=LOWEST) * inverse - total
        probs = tl.exp(log_probs)
        here = probs * (weight * (log_probs + mean) - factor)
        tl.store(
            grad + index * stride + columns, tl.where(columns == target, here + factor, here), mask=columns < vocab
        )


@triton.jit
def _two_kl(student, teacher, vocab, REVERSE: tl.constexpr, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Compute maximum and log(sum(exp(x - maximum))) of both rows, KL(S||T) and KL(T||S), each KL 0 if not requested.

    The sums of probability times (s - top_s) - (t - top_t) are rescaled as the maxima move. All their terms are of the
    size of the difference between the two rows, so nothing cancels where the rows are close.
    """
    zero, lowest = tl.full((), 0.0, tl.float32), tl.full((), LOWEST, tl.float32)
    top_s, top_t, total_s, total_t, reverse, forward = lowest, lowest, zero, zero, zero, zero
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = tl.load(student + columns, mask=columns < vocab, other=LOWEST)
        t = tl.load(teacher + columns, mask=columns < vocab, other=LOWEST)
        new_s, new_t = tl.maximum(top_s, tl.max(s, 0)), tl.maximum(top_t, tl.max(t, 0))
        kept_s, kept_t = tl.exp(top_s - new_s), tl.exp(top_t - new_t)
        exp_s, exp_t = tl.exp(s - new_s), tl.exp(t - new_t)
        ratio, moved = (s - new_s) - (t - new_t), (top_s - new_s) - (top_t - new_t)
        if REVERSE:
            reverse = kept_s * (reverse + total_s * moved) + tl.sum(exp_s * ratio, 0)
        if FORWARD:
            forward = kept_t * (forward + total_t * moved) + tl.sum(exp_t * ratio, 0)
        total_s = kept_s * total_s + tl.sum(exp_s, 0)
        total_t = kept_t * total_t + tl.sum(exp_t, 0)
        top_s, top_t = new_s, new_t
    log_s, log_t = tl.log(total_s), tl.log(total_t)
    if REVERSE:
        reverse = reverse / total_s - (log_s - log_t)
    if FORWARD:
        forward = (log_s - log_t) - forward / total_t
    return top_s, log_s, top_t, log_t, reverse, forward


@triton.jit
def _to_mixture(log_s, log_t, share):
    """Compute log s - log m and log t - log m of m = share * t + (1 - share) * s from log s - log t alone."""
    ratio = log_s - log_t
    less = tl.exp(-tl.abs(ratio))  # the smaller of the two over the larger
    above = ratio >= 0.0
    log_m = tl.log(tl.where(above, share * less + (1.0 - share), share + (1.0 - share) * less))  # over the larger
    return tl.where(above, 0.0, ratio) - log_m, tl.where(above, -ratio, 0.0) - log_m


@triton.jit
def _divergence(
    logits,
    teacher_logits,
    targets,
    scale,
    values,
    student_logprobs,
    teacher_logprobs,
    grad,
    share,
    vocab,
    stride,
    JSD: tl.constexpr,
    REVERSE: tl.constexpr,
    FORWARD: tl.constexpr,
    WITH_TARGETS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    student, teacher = logits + index * stride, teacher_logits + index * stride
    if WITH_TARGETS:
        target = tl.load(targets + index)
        target_s, target_t = tl.load(student + target), tl.load(teacher + target)  # before the gradient is written
    top_s, more_s, top_t, more_t, reverse, forward = _two_kl(student, teacher, vocab, REVERSE, FORWARD, BLOCK)
    if WITH_TARGETS:
        tl.store(student_logprobs + index, target_s - top_s - more_s)
        tl.store(teacher_logprobs + index, target_t - top_t - more_t)
    if JSD:
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            log_s = tl.load(student + columns, mask=columns < vocab, other=LOWEST) - top_s - more_s
            log_t = tl.load(teacher + columns, mask=columns < vocab, other=LOWEST) - top_t - more_t
            ratio_s, ratio_t = _to_mixture(log_s, log_t, share)
            reverse += tl.sum(tl.exp(log_s) * ratio_s, 0)
            forward += tl.sum(tl.exp(log_t) * ratio_t, 0)
    tl.store(values + index, (1.0 - share) * reverse + share * forward)
    if WITH_GRAD:
        factor = tl.load(scale + index)
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            log_s = tl.load(student + columns, mask=columns < vocab, other=LOWEST) - top_s - more_s
            log_t = tl.load(teacher + columns, mask=columns < vocab, other=LOWEST) - top_t - more_t
            probs = tl.exp(log_s)
            if JSD:
                ratio, _ = _to_mixture(log_s, log_t, share)
            else:
                ratio = log_s - log_t
            slope = (1.0 - share) * probs * (ratio - reverse)
            if FORWARD:
                slope += share * (probs - tl.exp(log_t))
            tl.store(grad + index * stride + columns, factor * slope, mask=columns < vocab)
