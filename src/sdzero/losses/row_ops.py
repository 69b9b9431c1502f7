"""Divergences and cross-entropy of rows of logits with their gradients, in place.

On CUDA, rows of the whole vocabulary go through Triton kernels (triton_kernels.py), which read each row two or three
times; these eager versions are the CPU path, and the kernels are tested against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from sdzero.losses.matmul import row_blocks

# Replaces -inf in a masked column: exp() gives the same 0 but 0 * MASKED is 0, not NaN.
MASKED = -1e30


def kernels_for(logits: Tensor) -> ModuleType | None:
    """Return the Triton kernels for float32 on CUDA, else or without Triton None. torch.compile is not a fallback: its
    CUDA code is Triton's too."""
    return _kernels() if logits.is_cuda and logits.dtype == torch.float32 else None


@cache
def _kernels() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from sdzero.losses import triton_kernels

    return triton_kernels


def log_softmax_(logits: Tensor) -> Tensor:
    """Normalise `logits` [C, V] in place."""
    if (kernels := kernels_for(logits)) is not None:
        return kernels.log_softmax_(logits)
    for block in row_blocks(logits):
        logits[block] = logits[block].log_softmax(-1)
    return logits


def cross_entropy(
    logits: Tensor, targets: Tensor, scale: Tensor | None, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Compute -log p(targets) [C] and scale times its gradient [C, V].

    Args:
        logits: [C, V], overwritten, possibly by the gradient.
        targets: [C] int64.
        scale: [C], or None for no gradient.
        grad_dtype: dtype in which the gradient will be used; only the kernels round to it, after its last operation.
    """
    if (kernels := kernels_for(logits)) is not None:
        return kernels.cross_entropy(logits, targets, scale, grad_dtype)
    values, column = logits.new_empty(len(logits)), targets[:, None]
    for block in row_blocks(logits):
        log_probs = logits[block].log_softmax(-1)
        values[block] = -log_probs.gather(1, column[block]).squeeze(1)
        if scale is not None:
            torch.mul(log_probs.exp_(), scale[block, None], out=logits[block])
    if scale is None:
        return values, None
    return values, logits.scatter_add_(1, column, -scale[:, None])


TokenLoss = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]
"""log p(targets) [B], entropy [B] and the rows of a block -> loss of each token [B], its derivative [B] with respect to
log p(targets)."""


def policy_gradient(
    logits: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    temperature: float,
    entropy_coef: float,
    scale: Tensor | None,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Compute the values [C] of `token_loss` at logits / temperature, and scale times the gradient [C, V].

    With slope c = d loss / d log p(y), the gradient with respect to the logits is
    (c * (1_y - p) + entropy_coef * p * (log p + H)) / temperature.

    Args:
        logits: [C, V], overwritten, possibly by the gradient.
        targets: [C] int64.
        token_loss: loss of each token; its value may contain -entropy_coef * H, its slope does not.
        temperature: divisor of the logits.
        entropy_coef: weight of the entropy H in the loss.
        scale: as in `cross_entropy`.
        grad_dtype: as in `cross_entropy`.
    """
    if (kernels := kernels_for(logits)) is not None:
        return kernels.policy_gradient(logits, targets, token_loss, temperature, entropy_coef, scale, grad_dtype)
    values, column = logits.new_empty(len(logits)), targets[:, None]
    slopes = torch.empty_like(values)
    for block in row_blocks(logits):
        log_probs = (logits[block] / temperature).log_softmax(-1)
        probs = log_probs.exp()
        entropy = -torch.linalg.vecdot(probs, log_probs)
        at_target = log_probs.gather(1, column[block]).squeeze(1)
        values[block], slopes[block] = token_loss(at_target, entropy, block)
        if scale is not None:
            per_probability = -slopes[block, None]
            if entropy_coef:
                per_probability = entropy_coef * (log_probs + entropy[:, None]) + per_probability
            torch.mul(probs * per_probability, scale[block, None] / temperature, out=logits[block])
    if scale is None:
        return values, None
    return values, logits.scatter_add_(1, column, (slopes * scale / temperature)[:, None])


def divergence(
    kind: str,
    share: float,
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None,
    scale: Tensor | None,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Compute the divergence [C] over the whole vocabulary, scale times its gradient [C, V], and the log-probabilities
    [C] of `targets` of student and teacher (an empty list without targets).

    `logits` and `teacher_logits` are [C, V]; kind and share as in `divergence_of_log_probs`, the rest as in
    `cross_entropy`.
    """
    if (kernels := kernels_for(logits)) is not None:
        return kernels.divergence(kind, share, logits, teacher_logits, targets, scale, grad_dtype)
    values = logits.new_empty(len(logits))
    target_logprobs = [] if targets is None else [torch.empty_like(values), torch.empty_like(values)]
    for block in row_blocks(logits):
        log_s, log_t = logits[block].log_softmax(-1), teacher_logits[block].log_softmax(-1)
        if targets is not None:
            for out, log_probs in zip(target_logprobs, (log_s, log_t), strict=True):
                out[block] = gather_targets(log_probs, targets[block])
        values[block], grad = divergence_of_log_probs(kind, share, log_s, log_t, scale is not None)
        if grad is not None and scale is not None:
            torch.mul(grad, scale[block, None], out=logits[block])
    return values, None if scale is None else logits, target_logprobs


def divergence_of_log_probs(
    kind: str, share: float, log_s: Tensor, log_t: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the divergence [C] of normalised rows and its gradient [C, W] with respect to the logits of `log_s`.

    With ratio = log s - log t: reverse gives s * (ratio - KL), forward s - t; JSD gives
    (1 - share) * s * (log s - log m - KL(s||m)). Every log is finite, so no 0 * inf can arise.

    Args:
        kind: reverse, forward, mixed or jsd.
        share: share of the forward KL in mixed, of the teacher in jsd.
        log_s: [C, W] of the student, overwritten.
        log_t: [C, W] of the teacher.
        with_grad: compute the gradient.
    """
    probs = log_s.exp()
    if kind == "jsd":
        log_m = torch.logaddexp(log_t + math.log(share), log_s + math.log1p(-share))
        ratio = log_s.sub_(log_m)
        to_mixture = torch.linalg.vecdot(probs, ratio)
        value = share * torch.linalg.vecdot(log_t.exp(), log_t - log_m) + (1 - share) * to_mixture
        return value, ratio.sub_(to_mixture[:, None]).mul_(1 - share).mul_(probs) if with_grad else None
    forward = {"reverse": 0.0, "forward": 1.0}.get(kind, share)
    ratio = log_s.sub_(log_t)
    reverse_kl = torch.linalg.vecdot(probs, ratio)
    value = (1 - forward) * reverse_kl
    teacher_probs = log_t.exp() if forward else None
    if teacher_probs is not None:
        value -= forward * torch.linalg.vecdot(teacher_probs, ratio)
    if not with_grad:
        return value, None
    grad = ratio.sub_(reverse_kl[:, None]).mul_(1 - forward).add_(forward).mul_(probs)
    return value, grad if teacher_probs is None else grad.sub_(teacher_probs, alpha=forward)


def gather_targets(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Gather the entries [C] of `log_probs` [C, V] at `targets` [C]."""
    return log_probs.gather(1, targets[:, None]).squeeze(1)


def divergence_with_rest(
    kind: str, share: float, log_s: Tensor, ids: Tensor, buckets_t: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the divergence [C] over the columns `ids` and one bucket of the others, and scale times its gradient.

    Args:
        kind: as in `divergence_of_log_probs`.
        share: as in `divergence_of_log_probs`.
        log_s: [C, V], the student's log-probabilities, overwritten by the gradient.
        ids: [C, K].
        buckets_t: [C, K + 1], the teacher's log-probabilities, the bucket of the others last.
        scale: [C], or None for no gradient.
    """
    inside_s, rest_s = log_s.gather(1, ids), split_rest(log_s, ids)
    buckets_s = torch.cat([inside_s, rest_s], -1).log_softmax(-1)
    values, grad = divergence_of_log_probs(kind, share, buckets_s, buckets_t, scale is not None)
    if grad is None or scale is None:
        return values, None
    grad *= scale[:, None]
    for block in row_blocks(log_s):  # the others share the gradient of their bucket in proportion to their mass
        torch.mul(log_s[block].exp(), grad[block, -1:], out=log_s[block])
    return values, log_s.scatter_(1, ids, grad[:, :-1])


def split_rest(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Compute the log of the mass outside the columns `ids`, [C, 1]; in place, `log_probs` loses them and is normalised
    over the others."""
    log_probs.scatter_(1, ids, MASKED)
    rest = log_probs.new_empty(len(log_probs), 1)
    for block in row_blocks(log_probs):
        rest[block] = log_probs[block].logsumexp(-1, keepdim=True)
        log_probs[block].sub_(rest[block])
    return rest
