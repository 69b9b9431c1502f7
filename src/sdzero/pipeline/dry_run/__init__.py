"""`sdzero run RECIPE --dry-run`: what a recipe will ask for, before anything is downloaded, loaded or written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdzero.pipeline.dry_run.assumptions import Assumptions, Config, load_architecture, load_assumptions
from sdzero.pipeline.dry_run.budget import Budget, budgets, one_epoch
from sdzero.pipeline.dry_run.checks import Memory, Survey, differing
from sdzero.pipeline.dry_run.tables import print_budgets, print_moments

__all__ = ["Plan", "dry_run", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What `sdzero run --dry-run` prints.

    Attributes:
        budgets: of the stages in order.
        one_epoch: the same with each training for one epoch, which is what appendix C.2 counts.
        memory: the moments of all stages, with refusals and notes.
        gpu_bytes: memory of a GPU; None: not known.
    """

    budgets: list[Budget]
    one_epoch: list[Budget]
    memory: Memory
    gpu_bytes: int | None


def make_plan(recipe: Path, configs: Mapping[str, Config]) -> Plan:
    """The plan of a recipe with plan.yaml in its folder.

    Args:
        recipe: the recipe's folder.
        configs: whole configs by stage, in order.

    Raises:
        ValueError: plan.yaml is wrong, or a training has no end.
    """
    assumptions = load_assumptions(recipe)
    first = "base" if "base" in configs else "base/eval"
    path = configs[first]["model"]["init_args"]["student"]["path"]
    model = load_architecture(path, assumptions)
    memory = Survey(configs, assumptions, model).run() if model else Memory()
    if model is None:
        memory.notes.append(f"memory: no model folder at {path}, and no plan.yaml that describes the model")
    memory.notes += _notes(recipe, configs, assumptions)
    gpu_bytes = int(assumptions.gpu_memory_gib * 2**30) if assumptions else None
    return Plan(budgets(configs, assumptions), one_epoch(configs, assumptions), memory, gpu_bytes)


def _notes(recipe: Path, configs: Mapping[str, Config], assumptions: Assumptions | None) -> list[str]:
    notes = []
    if "base" in configs:
        notes.append("base: what its training reads is not counted")
    if assumptions is None:
        notes.append(
            f"no {recipe / 'plan.yaml'}: tokens are upper bounds from max_new_tokens, prompts are left out of memory, "
            "and memory is compared with nothing"
        )
        return notes
    return [*notes, *differing(configs, assumptions)]


def dry_run(recipe: Path, configs: Mapping[str, Config]) -> None:
    """Prints the plan. Exits with status 1 and a line per reason where something of it cannot work."""
    plan = make_plan(recipe, configs)
    print_budgets(plan.budgets, plan.one_epoch)
    if plan.memory.moments:
        print_moments(plan.memory.moments, plan.gpu_bytes)
    for note in plan.memory.notes:
        print(f"note: {note}")
    if plan.memory.refusals:
        sys.exit("\n".join(f"sdzero run: error: {reason}" for reason in plan.memory.refusals))
