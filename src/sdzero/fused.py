"""The machinery of the loss heads: a vocabulary projection differentiated chunk by chunk in the forward pass.

A head's gradient with respect to its logits has a closed form, so it is made while the chunk's logits are still
there: no [N, V] tensor is ever held and nothing is projected twice (4 matrix products with a teacher, 3 without).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elementwise work goes over this many elements at a time, so that its temporaries stay in a CPU's cache.
BLOCK_ELEMENTS = 2**17
# Stands for -inf in a masked column: exp() gives the same 0 but 0 * MASKED is 0, not NaN.
MASKED = -1e30


@dataclass(frozen=True)
class Columns:
    """A gradient [C, V] that is zero outside a few columns a row: `ids` [C, K], distinct in a row; `values` [C, K]."""

    ids: Tensor
    values: Tensor


def row_blocks(rows: Tensor, width: int | None = None) -> Iterator[slice]:
    """Slices of `rows` small enough for the cache at `width` elements a row (its own by default); on an accelerator,
    which has no such cache, one slice."""
    count = len(rows)
    step = max(1, BLOCK_ELEMENTS // (width or rows.shape[1])) if rows.device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class Projection:
    """Logits `hidden @ weight.T` of some rows, in `dtype` whatever the inputs are, in one reused workspace.

    Args:
        hidden: [N, H].
        weight: [V, H].
        chunk_size: the most rows asked for at once.
        dtype: of the product and of all work on it. Products of bfloat16 cancel badly where student and teacher agree.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_size: int, dtype: torch.dtype) -> None:
        self.hidden = hidden.detach()
        self.weight = weight.detach().to(dtype)
        self.dtype = dtype
        self._chunk = min(chunk_size, len(hidden))
        self._workspace: Tensor | None = None

    def inputs(self, rows: slice) -> Tensor:
        """The hidden states of `rows`, [C, H]."""
        return self.hidden[rows].to(self.dtype)

    def logits(self, rows: slice) -> Tensor:
        """[C, V], valid until the next call; the caller may write into it."""
        if self._workspace is None:
            self._workspace = self.weight.new_empty(self._chunk, len(self.weight))
        inputs = self.inputs(rows)
        return torch.mm(inputs, self.weight.t(), out=self._workspace[: len(inputs)])

    def log_probs(self, rows: slice) -> Tensor:
        """`logits`, normalised over the vocabulary, in the same workspace."""
        logits = self.logits(rows)
        for block in row_blocks(logits):
            logits[block] = logits[block].log_softmax(-1)
        return logits

    def columns(self, rows: slice, ids: Tensor) -> Tensor:
        """The logits [C, K] of the columns `ids` [C, K] alone."""
        inputs = self.inputs(rows)
        out = inputs.new_empty(ids.shape)
        for block in row_blocks(ids, ids.shape[1] * inputs.shape[1]):
            torch.bmm(self.weight[ids[block]], inputs[block, :, None], out=out[block, :, None])
        return out


# A chunk's body: (the student's projection, the rows, d loss / d value of each row, or None where no gradient is
# wanted) -> (the rows' values [C], the gradient with respect to the logits).
Body = Callable[[Projection, slice, Tensor | None], tuple[Tensor, Tensor | Columns | None]]


def chunked_head(
    hidden: Tensor, weight: Tensor, scale: Tensor, body: Body, chunk_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sum(scale * value), differentiable once in `hidden` and `weight`, and the detached values [N].

    Args:
        hidden: [N, H].
        weight: [V, H].
        scale: [N] in `dtype`, the weight of each row in the sum.
        body: makes the values and the gradients of a chunk.
        chunk_size: rows a chunk.
        dtype: of the computation.
    """
    values = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    grad_on = torch.is_grad_enabled()
    wanted = (grad_on and hidden.requires_grad, grad_on and weight.requires_grad)
    loss = _ChunkedHead.apply(hidden, weight, scale, body, chunk_size, wanted, values)
    return loss, values  # pyright: ignore[reportReturnType]  (apply is untyped)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        scale: Tensor,
        body: Body,
        chunk_size: int,
        wanted: tuple[bool, bool],
        values: Tensor,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden, dtype=values.dtype) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=values.dtype) if wanted[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            student = Projection(hidden, weight, chunk_size, values.dtype)
            for start in range(0, len(hidden), chunk_size):
                rows = slice(start, start + chunk_size)
                values[rows], grad = body(student, rows, scale[rows] if any(wanted) else None)
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
        # Scaled in place and given away: a copy of the weight's gradient is the largest tensor of the whole head.
        grads, ctx.grads = ctx.grads, None
        scaled = [
            None if g is None else g.mul_(grad_outputs[0]).to(dt) for g, dt in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _project_back(
    grad: Tensor | Columns, inputs: Tensor, weight: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> None:
    """Writes grad @ weight into `grad_hidden` [C, H] and adds grad.T @ inputs to `grad_weight` [V, H]."""
    if isinstance(grad, Tensor):
        if grad_hidden is not None:
            torch.mm(grad, weight, out=grad_hidden)
        if grad_weight is not None:
            grad_weight.addmm_(grad.t(), inputs)
        return
    if grad_hidden is not None:
        grad_hidden.copy_(F.embedding_bag(grad.ids, weight, per_sample_weights=grad.values, mode="sum"))
    if grad_weight is not None:
        row = torch.arange(len(inputs), device=inputs.device).repeat_interleave(grad.ids.shape[1])
        indices = torch.stack([grad.ids.flatten(), row])
        shape = (len(weight), len(inputs))
        sparse = torch.sparse_coo_tensor(indices, grad.values.flatten(), shape, check_invariants=False)
        torch.addmm(grad_weight, sparse, inputs, out=grad_weight)


def compare(kind: str, share: float, log_s: Tensor, log_t: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The divergence [C] between normalised rows and its gradient [C, W] with respect to the logits behind `log_s`.

    With ratio = log s - log t: reverse gives s * (ratio - KL), forward s - t; JSD gives
    (1 - share) * s * (log s - log m - KL(s||m)). Every log is finite, so no 0 * inf can arise.

    Args:
        kind: reverse, forward, mixed or jsd.
        share: the forward KL's share in mixed, the teacher's in jsd.
        log_s: [C, W], the student; overwritten.
        log_t: [C, W], the teacher.
        with_grad: whether the gradient is wanted.
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


def of_targets(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The entries [C] of `log_probs` [C, V] at `targets` [C]."""
    return log_probs.gather(1, targets[:, None]).squeeze(1)


def compare_with_rest(
    kind: str, share: float, log_s: Tensor, ids: Tensor, buckets_t: Tensor, per_token: bool, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The divergence [C] over the columns `ids` and one bucket of all the others, and scale times its gradient [C, V].

    Args:
        kind: reverse, forward, mixed or jsd.
        share: as in `compare`.
        log_s: [C, V], the student's log-probabilities; its place is taken by the gradient.
        ids: [C, K].
        buckets_t: [C, K + 1], the teacher's log-probabilities, the others' bucket last.
        per_token: whether the bucket stands for a teacher that gives EVERY token outside the bucket's log-probability.
        scale: [C], or None where no gradient is wanted.
    """
    inside_s, rest_s = log_s.gather(1, ids), split_off(log_s, ids)
    buckets_s = torch.cat([inside_s, rest_s], -1).log_softmax(-1)
    probs_s = buckets_s.exp()
    values, grad = compare(kind, share, buckets_s, buckets_t, scale is not None)
    entropy = slope = torch.zeros_like(rest_s)
    if per_token and kind in ("reverse", "mixed"):
        # The bucket's reverse KL lacks the student's own entropy among the tokens outside.
        entropy = row_entropy(log_s)
        slope = probs_s[:, -1:] * (1.0 if kind == "reverse" else 1 - share)
        values -= (slope * entropy).squeeze(1)
    if grad is None or scale is None:
        return values, None
    grad += slope * entropy * probs_s
    grad[:, -1:] -= slope * entropy
    return values, spread(log_s, ids, grad * scale[:, None], slope * scale[:, None], entropy)


def split_off(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log of the mass outside the columns `ids`, [C, 1]; `log_probs` is left normalised outside them, 0 mass inside."""
    log_probs.scatter_(1, ids, MASKED)
    rest = log_probs.new_empty(len(log_probs), 1)
    for block in row_blocks(log_probs):
        rest[block] = log_probs[block].logsumexp(-1, keepdim=True)
        log_probs[block].sub_(rest[block])
    return rest


def row_entropy(log_probs: Tensor) -> Tensor:
    """Entropy of each row, [C, 1]."""
    entropy = log_probs.new_empty(len(log_probs))
    for block in row_blocks(log_probs):
        entropy[block] = -torch.linalg.vecdot(log_probs[block].exp(), log_probs[block])
    return entropy[:, None]


def spread(log_outside: Tensor, ids: Tensor, grad: Tensor, slope: Tensor, entropy: Tensor) -> Tensor:
    """The gradient [C, V] of all logits, in `log_outside`'s place, from that of the top-k's and the rest's [C, K + 1].

    The rest's goes to the tokens outside in proportion q to their mass; entropy's is -q * (log q + entropy).
    """
    for block in row_blocks(log_outside):
        log_q = log_outside[block]
        per_mass = torch.addcmul(grad[block, -1:], slope[block], log_q + entropy[block])
        torch.mul(log_q.exp(), per_mass, out=log_q)
    return log_outside.scatter_(1, ids, grad[:, :-1])
