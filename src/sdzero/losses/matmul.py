"""Device-dependent choices: matmuls of low-precision operands, chunk and block sizes.

CUDA's matrix units multiply bfloat16 and float16 operands and accumulate in float32: there the operands stay as they
are and the float32 result is kept. Elsewhere operands are cast to float32 first, which gives the same sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_SIZE = 256
CUDA_CHUNK_SIZE = 2048  # fewer rows leave the matrix units idle
LOW_PRECISION = (torch.bfloat16, torch.float16)
# Elements per block of elementwise work: on a CPU its temporaries stay in the cache, on an accelerator they stay small
# against a chunk's logits.
BLOCK_ELEMENTS = 2**17
ACCELERATOR_BLOCK_ELEMENTS = 2**26


def uses_cuda_matmul(device: torch.device) -> bool:
    """Decide whether to use the CUDA matmul paths."""
    return device.type == "cuda"


def chunk_size(requested: int | None, hidden: Tensor) -> int:
    """Return the number of tokens whose logits exist at once; None takes the default of the device of `hidden`."""
    if requested is None:
        return CUDA_CHUNK_SIZE if hidden.is_cuda else CHUNK_SIZE
    if requested < 1:
        raise ValueError(f"chunk_size must be at least 1, got {requested}")
    return requested


def result_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of logits and gradients: float32, or float64 if an input is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def operand_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which `hidden` and `weight` are multiplied: on CUDA the low precision of autocast or else of
    `hidden`, in all other cases `dtype`, that of the result."""
    if dtype != torch.float32 or not uses_cuda_matmul(hidden.device):
        return dtype
    device = hidden.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return low if low in LOW_PRECISION else dtype


def row_blocks(rows: Tensor, width: int | None = None) -> Iterator[slice]:
    """Split `rows` into slices of one block each, at `width` elements per row (its own by default)."""
    limit = BLOCK_ELEMENTS if rows.device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS
    count, step = len(rows), max(1, limit // (width or rows.shape[1]))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute out = a @ b, of matrices or of batches of them, in the dtype of `out`."""
    product = torch.mm if a.ndim == 2 else torch.bmm
    if a.is_cuda and a.dtype != out.dtype:
        return product(a, b, out_dtype=out.dtype, out=out)
    return product(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute out += a @ b in the dtype of `out`."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def add_outer_(out: Tensor, ids: Tensor, values: Tensor, inputs: Tensor) -> None:
    """Compute out[ids[c, k]] += values[c, k] * inputs[c]: `out` [V, H], `ids` and `values` [C, K], `inputs` [C, H]."""
    values, inputs = values.to(out.dtype), inputs.to(out.dtype)
    if uses_cuda_matmul(out.device):  # CUDA's sparse matmul first copies the whole of `out`
        for block in row_blocks(ids, ids.shape[1] * inputs.shape[1]):
            rows = values[block, :, None] * inputs[block, None]
            out.index_add_(0, ids[block].flatten(), rows.flatten(0, 1))
        return
    row = torch.arange(len(inputs), device=inputs.device).repeat_interleave(ids.shape[1])
    indices, shape = torch.stack([ids.flatten(), row]), (len(out), len(inputs))
    sparse = torch.sparse_coo_tensor(indices, values.flatten(), shape, check_invariants=False)
    torch.addmm(out, sparse, inputs, out=out)
