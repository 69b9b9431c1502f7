"""Chunked LM head fused with its loss: the vocabulary projection is differentiated in the forward pass.

A loss's gradient with respect to its logits has a closed form, so it is computed while the chunk's logits are still
in memory: no [N, V] tensor is ever held and nothing is projected twice (4 matmuls with a teacher, 3 without).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdzero.losses import matmul, row_ops


@dataclass(frozen=True)
class Columns:
    """Gradient [C, V] that is zero outside K columns of each row: `ids` [C, K], distinct in a row; `values` [C, K]."""

    ids: Tensor
    values: Tensor


class Projection:
    """Logits `hidden @ weight.T` of a slice of rows, in one reused workspace.

    Construct it inside the caller's autocast context, which decides the operands' dtype on CUDA.

    Args:
        hidden: [N, H].
        weight: [V, H].
        chunk_size: maximum number of rows per call.
        dtype: dtype of the logits; rounded to bfloat16 they would cancel badly where student and teacher agree.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_size: int, dtype: torch.dtype) -> None:
        self.operands = matmul.operand_dtype(hidden, weight, dtype)
        self.hidden = hidden.detach()
        self.weight = weight.detach().to(self.operands)
        self.dtype = dtype
        self._chunk = min(chunk_size, len(hidden))
        self._workspace: Tensor | None = None

    def inputs(self, rows: slice) -> Tensor:
        """Return the hidden states of `rows`, [C, H]."""
        return self.hidden[rows].to(self.operands)

    def logits(self, rows: slice) -> Tensor:
        """Compute the logits [C, V], valid until the next call; the caller may overwrite them."""
        if self._workspace is None:
            self._workspace = self.weight.new_empty(self._chunk, len(self.weight), dtype=self.dtype)
        inputs = self.inputs(rows)
        return matmul.mm(inputs, self.weight.t(), self._workspace[: len(inputs)])

    def log_probs(self, rows: slice) -> Tensor:
        """Compute the log-probabilities [C, V] in the workspace of `logits`."""
        return row_ops.log_softmax_(self.logits(rows))

    def columns(self, rows: slice, ids: Tensor) -> Tensor:
        """Compute only the logits [C, K] of the columns `ids` [C, K]."""
        inputs = self.inputs(rows)
        out = inputs.new_empty(ids.shape, dtype=self.dtype)
        for block in matmul.row_blocks(ids, ids.shape[1] * inputs.shape[1]):
            matmul.mm(self.weight[ids[block]], inputs[block, :, None], out[block, :, None])
        return out


# Body of a chunk: (the student's projection, the rows, d loss / d value of each row, or None if no gradient is needed)
# -> (values [C], gradient with respect to the logits).
Body = Callable[[Projection, slice, Tensor | None], tuple[Tensor, Tensor | Columns | None]]


def chunked_head(
    hidden: Tensor,
    weight: Tensor,
    token_weights: Tensor,
    num_tokens: float | Tensor,
    body: Body,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute sum(token_weights * value) / num_tokens, differentiable once, and the detached values [N].

    `body` computes values and gradients of a chunk; the other arguments are those of `cross_entropy_head`.
    """
    dtype, chunk_size = matmul.result_dtype(hidden, weight), matmul.chunk_size(chunk_size, hidden)
    count = float(num_tokens)
    if len(hidden) and not count > 0:
        raise ValueError(f"num_tokens must be positive if there are tokens, got {count}: count the global batch")
    scale = token_weights.detach().to(dtype) / count
    values = torch.zeros_like(scale)
    grad_on = torch.is_grad_enabled()
    needs_grad = (grad_on and hidden.requires_grad, grad_on and weight.requires_grad)
    student = Projection(hidden, weight, chunk_size, dtype)
    loss = _ChunkedHead.apply(hidden, weight, student, scale, body, chunk_size, needs_grad, values)
    return loss, values  # pyright: ignore[reportReturnType]  (apply is untyped)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        student: Projection,
        scale: Tensor,
        body: Body,
        chunk_size: int,
        needs_grad: tuple[bool, bool],
        values: Tensor,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden, dtype=values.dtype) if needs_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=values.dtype) if needs_grad[1] else None
        ctx.unit = _unit(scale, student.operands)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk_size):
                rows = slice(start, start + chunk_size)
                row_scale = scale[rows] if ctx.unit is None else scale[rows] / ctx.unit
                values[rows], grad = body(student, rows, row_scale if any(needs_grad) else None)
                if grad is not None:
                    out = None if grad_hidden is None else grad_hidden[rows]
                    _project_back(grad, student.inputs(rows), student.weight, out, grad_weight)
        ctx.grads = (grad_hidden, grad_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return torch.dot(scale, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("a loss head can be differentiated once: call the head again for a second backward")
        # Scaled in place and released: the weight's gradient is the largest tensor of the head, so it is not copied.
        grads, ctx.grads = ctx.grads, None
        factor = grad_outputs[0] if ctx.unit is None else grad_outputs[0] * ctx.unit
        scaled = [None if g is None else g.mul_(factor).to(dt) for g, dt in zip(grads, ctx.dtypes, strict=True)]
        return (*scaled, None, None, None, None, None, None)


def _unit(scale: Tensor, operands: torch.dtype) -> Tensor | None:
    """Compute the factor that backward puts back for float16 operands, which underflow at probability / num_tokens."""
    if operands != torch.float16 or not len(scale):
        return None
    largest = scale.abs().max()
    return torch.where(largest > 0, largest, 1.0)


def _project_back(
    grad: Tensor | Columns, inputs: Tensor, weight: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> None:
    """Write grad @ weight to `grad_hidden` [C, H], add grad.T @ inputs to `grad_weight` [V, H], in weight's dtype."""
    if isinstance(grad, Tensor):
        grad = grad.to(weight.dtype)
        if grad_hidden is not None:
            matmul.mm(grad, weight, grad_hidden)
        if grad_weight is not None:
            matmul.addmm_(grad_weight, grad.t(), inputs)
        return
    values = grad.values.to(weight.dtype)
    if grad_hidden is not None:
        grad_hidden.copy_(F.embedding_bag(grad.ids, weight, per_sample_weights=values, mode="sum"))
    if grad_weight is not None:
        matmul.add_outer_(grad_weight, grad.ids, values, inputs)
