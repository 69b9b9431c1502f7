"""`sdzero run RECIPE --dry-run`: budgets and memory of a recipe, before anything is downloaded, loaded or written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from sdzero.pipeline.dry_run.assumptions import ASSUMPTIONS, load_architecture, load_assumptions
from sdzero.pipeline.dry_run.budget import Budget, budgets, dry_stages, one_epoch
from sdzero.pipeline.dry_run.checks import Memory, MemoryCheck, unreachable_lengths
from sdzero.pipeline.dry_run.memory import GIB
from sdzero.pipeline.dry_run.tables import print_budgets, print_peaks
from sdzero.utils.recipe import Recipe
from sdzero.utils.yaml_config import Config

__all__ = ["Estimate", "dry_run", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """Content of a dry run's tables."""

    budgets: list[Budget]  # of the stages in order
    one_epoch: list[Budget]  # the same with one epoch of each training, as appendix C.2 counts
    memory: Memory
    gpu_bytes: int | None  # memory of a GPU; None: unknown


def estimate(recipe: Recipe, configs: Mapping[str, Config]) -> Estimate:
    """Estimate budgets and memory of a recipe.

    Args:
        recipe: the recipe; its dry_run.yaml has what only a run would show.
        configs: whole configs by stage, in order.

    Raises:
        ValueError: dry_run.yaml is wrong, or a training has no end.
    """
    assumptions, stages = load_assumptions(recipe), dry_stages(recipe, configs)
    path = next(config["model"] for config in configs.values() if "model" in config)["init_args"]["student"]["path"]
    model = load_architecture(path, assumptions)
    memory = MemoryCheck(stages, assumptions, model).run() if model else Memory()
    if model is None:
        memory.notes.append(f"memory: no model folder at {path}, and no {ASSUMPTIONS} that describes the model")
    memory.notes += [f"{stage.name}: its training is not counted" for stage in stages if stage.kind == "other"]
    if assumptions is None:
        memory.notes.append(
            f"no {recipe.folder / ASSUMPTIONS}: tokens are upper bounds from max_new_tokens, prompts are left out of "
            "memory, and memory is not compared with a GPU's"
        )
    else:
        memory.notes += unreachable_lengths(stages, assumptions)
    gpu_bytes = int(assumptions.gpu_memory_gib * GIB) if assumptions else None
    return Estimate(budgets(stages, assumptions), one_epoch(stages, assumptions), memory, gpu_bytes)


def dry_run(recipe: Recipe, configs: Mapping[str, Config]) -> None:
    """Print the estimate. Exits with status 1 and a line per reason if the recipe cannot work."""
    found = estimate(recipe, configs)
    print_budgets(found.budgets, found.one_epoch)
    if found.memory.peaks:
        print_peaks(found.memory.peaks, found.gpu_bytes)
    for note in found.memory.notes:
        print(f"note: {note}")
    if found.memory.refusals:
        sys.exit("\n".join(f"sdzero run: error: {reason}" for reason in found.memory.refusals))
