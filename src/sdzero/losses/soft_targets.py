"""Teacher distributions as inputs of a loss: exact, as hidden states and head, or as the top-k of each position.

Legend: N target tokens, V vocabulary, K top-k, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdzero.losses import matmul, row_ops
from sdzero.losses.fused_linear import Projection


@dataclass(frozen=True)
class HiddenTargets:
    """Last hidden states [N, Ht] and LM head [V, Ht] of the teacher: exact. No gradient flows into either."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's K likeliest tokens: `ids` [N, K] int64 and `logprobs` [N, K] over the whole vocabulary (not
    renormalised), in any order; `target_logprobs` [N] of the sampled tokens, if known."""

    ids: Tensor
    logprobs: Tensor
    target_logprobs: Tensor | None = None


SoftTargets = HiddenTargets | TopKTargets


def hidden_targets(hidden: Tensor, weight: Tensor) -> HiddenTargets:
    """Head that keeps the exact output of a teacher's forward pass.

    Not the class itself: FSDP2 takes a dataclass among a module's inputs, even a class object, for a container of
    tensors and tries to rebuild it.
    """
    return HiddenTargets(hidden, weight)


@torch.no_grad()
def top_k_targets(
    hidden: Tensor, weight: Tensor, targets: Tensor, top_k: int, chunk_size: int | None = None
) -> TopKTargets:
    """Head that keeps the teacher's `top_k` at each position and its log-probability of `targets`, without a gradient.

    Args:
        hidden: [N, H], the teacher's last hidden states; N may be 0.
        weight: [V, H], its LM head.
        targets: [N] int64, the sampled tokens y_t.
        top_k: tokens kept at each position.
        chunk_size: as in `cross_entropy_head`.

    Raises:
        ValueError: top_k exceeds the vocabulary, or chunk_size is not positive.
    """
    check_top_k(top_k, len(weight))
    dtype, chunk_size = matmul.result_dtype(hidden, weight), matmul.chunk_size(chunk_size, hidden)
    kept = TopKTargets(
        targets.new_empty(len(hidden), top_k),
        hidden.new_empty(len(hidden), top_k, dtype=dtype),
        target_logprobs := hidden.new_empty(len(hidden), dtype=dtype),
    )
    projection = Projection(hidden, weight, chunk_size, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            log_probs = projection.log_probs(rows)
            target_logprobs[rows] = row_ops.gather_targets(log_probs, targets[rows])
            kept.logprobs[rows], kept.ids[rows] = log_probs.topk(top_k, sorted=False)
    return kept


def check_top_k(top_k: int | None, num_tokens: int | None = None, source: str = "the vocabulary") -> None:
    """Raise ValueError if a support of `top_k` tokens cannot be taken from the `num_tokens` of `source`, if known."""
    if top_k is None or (top_k >= 1 and (num_tokens is None or top_k <= num_tokens)):
        return
    bounds = "at least 1" if num_tokens is None else f"from 1 to {num_tokens}, the size of {source}"
    raise ValueError(f"divergence.top_k={top_k}: must be {bounds}; null compares the whole vocabulary")
