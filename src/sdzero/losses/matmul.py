"""What depends on the device: how low-precision operands are multiplied, and how much is worked on at once.

CUDA's matrix units take bfloat16 and float16 operands and add up in float32: there the operands stay as they are and
the float32 sums are handed out. Elsewhere a product's operands are brought to float32 first, which gives the same sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_SIZE = 256
CUDA_CHUNK_SIZE = 2048  # fewer rows leave its matrix units idle
LOW_PRECISION = (torch.bfloat16, torch.float16)
# Elementwise work goes over this many elements at a time, so that its temporaries stay in a CPU's cache.
BLOCK_ELEMENTS = 2**17
# An accelerator has no such cache: there the limit keeps temporaries small against a chunk's logits.
ACCELERATOR_BLOCK_ELEMENTS = 2**26


def accelerated(device: torch.device) -> bool:
    """Whether the products of CUDA are to be made."""
    return device.type == "cuda"


def chunk_size(chosen: int | None, hidden: Tensor) -> int:
    """Tokens whose logits exist at once: `chosen`, or by the device of `hidden`."""
    if chosen is None:
        return CUDA_CHUNK_SIZE if hidden.is_cuda else CHUNK_SIZE
    if chosen < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chosen}")
    return chosen


def result_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What logits and gradients are made in: float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def operand_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What `hidden` and `weight` are multiplied in: `dtype`, the result's, or on CUDA the low precision that autocast
    sets or, without it, the hidden states have."""
    if dtype != torch.float32 or not accelerated(hidden.device):
        return dtype
    device = hidden.device.type
    chosen = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return chosen if chosen in LOW_PRECISION else dtype


def row_blocks(rows: Tensor, width: int | None = None) -> Iterator[slice]:
    """Slices of `rows` that are small enough to work on at once, at `width` elements a row (its own by default)."""
    limit = BLOCK_ELEMENTS if rows.device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS
    count, step = len(rows), max(1, limit // (width or rows.shape[1]))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in the precision of `out`, written there."""
    if a.is_cuda and a.dtype != out.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in the precision of `out`."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def bmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b of each batch in the precision of `out`, written there."""
    if a.is_cuda and a.dtype != out.dtype:
        return torch.bmm(a, b, out_dtype=out.dtype, out=out)
    return torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_outer_(out: Tensor, ids: Tensor, values: Tensor, inputs: Tensor) -> None:
    """out[ids[c, k]] += values[c, k] * inputs[c] for `out` [V, H], `ids` and `values` [C, K], `inputs` [C, H]."""
    values, inputs = values.to(out.dtype), inputs.to(out.dtype)
    if accelerated(out.device):  # its sparse product would first copy the whole of `out`
        for block in row_blocks(ids, ids.shape[1] * inputs.shape[1]):
            rows = values[block, :, None] * inputs[block, None]
            out.index_add_(0, ids[block].flatten(), rows.flatten(0, 1))
        return
    row = torch.arange(len(inputs), device=inputs.device).repeat_interleave(ids.shape[1])
    indices, shape = torch.stack([ids.flatten(), row]), (len(out), len(inputs))
    sparse = torch.sparse_coo_tensor(indices, values.flatten(), shape, check_invariants=False)
    torch.addmm(out, sparse, inputs, out=out)
