"""Weighted cross-entropy (equations 1 to 3) from hidden states."""

from __future__ import annotations

from torch import Tensor

from sdzero.losses import row_ops
from sdzero.losses.fused_linear import Projection, chunked_head
from sdzero.types import LossOutput


def cross_entropy_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    num_tokens: float | Tensor,
    chunk_size: int | None = None,
) -> LossOutput:
    """Compute sum(token_weights * -log p(targets)) / num_tokens.

    Args:
        hidden: [N, H], last hidden states; N may be 0.
        weight: [V, H], LM head. On CUDA it is multiplied in the dtype of autocast, or of `hidden`; logits and loss are
            float32 whatever the dtypes and autocast are (float64 if an input is).
        targets: [N] int64.
        token_weights: [N].
        num_tokens: divisor of the sum, counted over all ranks and micro batches.
        chunk_size: tokens whose logits exist at once; None is 2,048 on CUDA and 256 elsewhere.

    Returns:
        The loss, differentiable once in `hidden` and `weight`; metrics `logprobs` [N], log p(targets) in nats.

    Raises:
        ValueError: chunk_size or num_tokens is not positive.
    """

    def body(student: Projection, rows: slice, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return row_ops.cross_entropy(student.logits(rows), targets[rows], scale, student.operands)

    loss, values = chunked_head(hidden, weight, token_weights, num_tokens, body, chunk_size)
    return LossOutput(loss, {"logprobs": -values})
