"""Learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule, stepped once per optimizer step.

    Args:
        name: `constant`, `linear` (to 0) or `cosine` (to 0), after the warm-up.
        warmup_steps: steps of linear warm-up.
        warmup_ratio: warm-up as a fraction of all steps; only one of the two may be set.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("schedule: set warmup_steps or warmup_ratio, not both")

    def build(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """Build the torch scheduler for a training of `num_steps` optimizer steps."""
        from transformers import get_scheduler

        name = "constant_with_warmup" if self.name == "constant" else self.name
        warmup = self.warmup_steps or int(self.warmup_ratio * num_steps)
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
