"""Equations 1 to 4, every divergence and the clipped policy loss as plain formulas on whole logits.

Slow and memory-hungry on purpose: read them beside the paper. The fused heads are tested against them, in float64.

Legend: T tokens of one sequence's target, N target tokens, V vocabulary, K top-k. `logits` at a token are those of the
position before it. All values are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdzero.losses.divergence import Divergence
from sdzero.losses.policy_gradient import PolicyLoss


def surprisal(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute -log pi(y_t | context, y_<t) [T] from `logits` [T, V] and `targets` [T]."""
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def mean(token_losses: Sequence[Tensor], reduction: str = "token_mean") -> Tensor:
    """Average over a data set of token losses [T], one tensor per sequence.

    `sequence_sum` is the expectation of a sum, as in equations 1, 2 and 4; `token_mean` divides by the tokens of all
    sequences.
    """
    total = sum((losses.sum() for losses in token_losses), torch.zeros(()))
    return total / (len(token_losses) if reduction == "sequence_sum" else sum(map(len, token_losses)))


def revision_loss(
    logits: Sequence[Tensor], targets: Sequence[Tensor], num_init: Sequence[int], reduction: str = "token_mean"
) -> Tensor:
    """Compute L_revision (equation 1): the surprisal of y' = y_revised given x, y_init, P_r.

    Args:
        logits: [T, V] of each trace, at the tokens of [y_init, P_r, y_revised].
        targets: [T] of each trace, those tokens.
        num_init: tokens of [y_init, P_r] in each trace.
        reduction: as in `mean`.
    """
    return mean([surprisal(z[n:], y[n:]) for z, y, n in zip(logits, targets, num_init, strict=True)], reduction)


def generation_loss(logits: Sequence[Tensor], targets: Sequence[Tensor], reduction: str = "token_mean") -> Tensor:
    """Compute L_generation (equation 2): the surprisal of y' = [y_init, P_r, y_revised] given x."""
    return mean([surprisal(z, y) for z, y in zip(logits, targets, strict=True)], reduction)


def srt_loss(
    logits: Sequence[Tensor], targets: Sequence[Tensor], num_init: Sequence[int], reduction: str = "token_mean"
) -> Tensor:
    """Compute L_SRT = L_revision + L_generation (equation 3)."""
    return revision_loss(logits, targets, num_init, reduction) + generation_loss(logits, targets, reduction)


def self_distillation_loss(
    logits_s: Sequence[Tensor],
    logits_t: Sequence[Tensor],
    divergence: Divergence,
    reduction: str = "token_mean",
) -> Tensor:
    """Compute L_Self-Distillation (equation 4): the divergence of student from reviser at every token of y.

    Args:
        logits_s: [T, V] of each response, the student's given x, y_<t.
        logits_t: [T, V] of each response, the reviser's given x, y, P_r, y_<t; detached.
        divergence: D; equation 4 has the default `Divergence()`, KL(student || reviser).
        reduction: as in `mean`.
    """
    pairs = zip(logits_s, logits_t, strict=True)
    return mean([token_divergence(s, t.detach(), divergence) for s, t in pairs], reduction)


def token_divergence(logits_s: Tensor, logits_t: Tensor, divergence: Divergence) -> Tensor:
    """Compute D(student, teacher) [N] of `logits_s` and `logits_t` [N, V]."""
    log_s, log_t = logits_s.log_softmax(-1), logits_t.log_softmax(-1)
    if divergence.top_k is not None:
        log_s, log_t = restrict(log_s, log_t, divergence)
    share = divergence.weight
    if divergence.kind == "reverse":
        return kl(log_s, log_t)
    if divergence.kind == "forward":
        return kl(log_t, log_s)
    if divergence.kind == "mixed":
        return share * kl(log_t, log_s) + (1 - share) * kl(log_s, log_t)
    log_m = (share * log_t.exp() + (1 - share) * log_s.exp()).clamp_min(1e-300).log()  # jsd
    return share * kl(log_t, log_m) + (1 - share) * kl(log_s, log_m)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    reference_logprobs: Tensor,
    entropy: Tensor,
    loss: PolicyLoss,
) -> Tensor:
    """Compute the clipped policy loss of each token [N] from log-probabilities at the sampling temperature [N]."""
    ratio = (logprobs - old_logprobs.detach()).exp()
    values = -torch.minimum(ratio * advantages, ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high) * advantages)
    if loss.dual_clip is not None:
        values = torch.where(advantages < 0, torch.minimum(values, -loss.dual_clip * advantages), values)
    delta = reference_logprobs.detach() - logprobs
    return values + loss.kl_coef * (delta.exp() - delta - 1) - loss.entropy_coef * entropy


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p || q) = sum_v p(v) * (log p(v) - log q(v))."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def restrict(log_s: Tensor, log_t: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Restrict both distributions [N, V] to the top-k support of the teacher or the student (table 6).

    Returns:
        Log-probabilities [N, K] (renormalize) or [N, K + 1] (tail).
    """
    assert divergence.top_k is not None
    ids = (log_t if divergence.support == "teacher" else log_s.detach()).topk(divergence.top_k).indices
    inside_s, inside_t = log_s.gather(1, ids), log_t.gather(1, ids)
    if divergence.outside == "renormalize":
        return inside_s.log_softmax(-1), inside_t.log_softmax(-1)
    inside = torch.zeros_like(log_s, dtype=torch.bool).scatter(1, ids, True)
    rest_s, rest_t = (x.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True) for x in (log_s, log_t))
    return torch.cat([inside_s, rest_s], -1), torch.cat([inside_t, rest_t], -1)
