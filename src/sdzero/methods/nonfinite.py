"""Error and batch dump of a step with a NaN or infinite loss or gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from sdzero.types import Example
from sdzero.utils.files import atomic_write


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite in more steps than `max_nonfinite_steps` allows."""


def write_batch(
    folder: Path,
    step: int,
    rank: int,
    examples: Sequence[Example],
    metrics: Mapping[str, float],
    denominators: Sequence[int],
) -> Path:
    """Writes this rank's examples as FOLDER/step=N-rank=R.pt, and returns the path.

    `torch.load(path)` gives a dict of plain Python values: step, rank, examples (the fields of `Example`), metrics
    (loss, gradient norm and others over all ranks) and denominators (of the loss).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step={step}-rank={rank}.pt"
    rows = [asdict(example) for example in examples]
    contents = {
        "step": step,
        "rank": rank,
        "examples": rows,
        "metrics": dict(metrics),
        "denominators": list(denominators),
    }
    with atomic_write(path) as file:
        torch.save(contents, file)
    return path
