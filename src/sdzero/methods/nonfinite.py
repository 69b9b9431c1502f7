"""What a step that stopped the run was made of, on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from sdzero.types import Example
from sdzero.utils.files import atomic_write


def write_post_mortem(
    folder: Path, step: int, rank: int, examples: Sequence[Example], figures: Mapping[str, float], counts: Sequence[int]
) -> Path:
    """Writes this rank's examples as FOLDER/step=N-rank=R.pt, and returns the path.

    `torch.load(path)` gives a dict of plain Python values: step, rank, examples (the fields of `Example`: ids, token
    ids, the teacher's context, rewards, weights), figures (loss, gradient norm, metrics; of all ranks) and counts
    (what the loss was divided by).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step={step}-rank={rank}.pt"
    rows = [asdict(example) for example in examples]
    contents = {"step": step, "rank": rank, "examples": rows, "figures": dict(figures), "counts": list(counts)}
    with atomic_write(path) as file:
        torch.save(contents, file)
    return path
