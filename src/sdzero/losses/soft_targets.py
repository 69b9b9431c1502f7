"""The teacher as a loss reads it: whole, by its hidden states, or as the likeliest tokens of each position.

Legend: N target tokens, V vocabulary, K top-k, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdzero.losses import matmul, row_ops
from sdzero.losses.fused_linear import Projection


@dataclass(frozen=True)
class HiddenTeacher:
    """The teacher as its last hidden states [N, Ht] and its head [V, Ht]: exact. No gradient flows into either."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TopKTeacher:
    """The teacher as its K likeliest tokens: `ids` [N, K] int64, `logprobs` [N, K] over the whole vocabulary (not
    renormalised), in any order; `target_logprobs` [N], where known, are those of the sampled tokens."""

    ids: Tensor
    logprobs: Tensor
    target_logprobs: Tensor | None = None


Teacher = HiddenTeacher | TopKTeacher


def hidden_teacher(hidden: Tensor, weight: Tensor) -> HiddenTeacher:
    """A head that keeps what a teacher's pass gives. The class itself will not do: sharded models take a dataclass
    among their inputs, even the class of one, for a container of tensors, and rebuild it."""
    return HiddenTeacher(hidden, weight)


def top_k_teacher(
    hidden: Tensor, weight: Tensor, targets: Tensor, top_k: int, chunk_size: int | None = None
) -> TopKTeacher:
    """A head that keeps a teacher's `top_k` at each position, and what it gives `targets`. No gradient flows.

    Args:
        hidden: [N, H], the teacher's last hidden states; N may be 0.
        weight: [V, H], its head.
        targets: [N] int64, the sampled tokens y_t.
        top_k: tokens kept at each position.
        chunk_size: as in `divergence_head`.

    Raises:
        ValueError: top_k exceeds the vocabulary, or chunk_size is not positive.
    """
    check_top_k(top_k, len(weight))
    dtype, chunk_size = matmul.result_dtype(hidden, weight), matmul.chunk_size(chunk_size, hidden)
    kept = TopKTeacher(
        targets.new_empty(len(hidden), top_k),
        hidden.new_empty(len(hidden), top_k, dtype=dtype),
        target_logprobs := hidden.new_empty(len(hidden), dtype=dtype),
    )
    projection = Projection(hidden, weight, chunk_size, dtype)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            log_probs = projection.log_probs(rows)
            target_logprobs[rows] = row_ops.of_targets(log_probs, targets[rows])
            kept.logprobs[rows], kept.ids[rows] = log_probs.topk(top_k, sorted=False)
    return kept


def check_top_k(top_k: int, vocab: int) -> None:
    if top_k > vocab:
        raise ValueError(
            f"top_k must be at most the vocabulary's size {vocab}, got {top_k}: lower it or set it to null"
        )
