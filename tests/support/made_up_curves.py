"""TensorBoard curves made up for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


def write_curves(folder: Path, curves: Mapping[str, list[float] | dict[int, float]]) -> None:
    """Curves of a stage, by tag: a value a step, or values by step."""
    with SummaryWriter(str(folder)) as writer:
        for tag, values in curves.items():
            for step, value in values.items() if isinstance(values, dict) else enumerate(values):
                writer.add_scalar(tag, value, step)
