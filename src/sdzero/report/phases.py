"""Curves over the trainings of a run (figures 5 and 6)."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd

from sdzero.report.run_folder import RunFolder


def num_steps(run: RunFolder, stage: str) -> int:
    """Return the number of optimizer steps that a stage has logged; 0 where there is no such stage."""
    return max((step + 1 for step, _ in run.scalars(stage, "train/loss")), default=0)


def over_phases(run: RunFolder, metric: str, rollout: str | None = None) -> pd.DataFrame:
    """Collect a metric of all evaluations, validations and rollouts of a run, model by model.

    Args:
        run: a run, finished or not.
        metric: a tag under eval/, such as `response_tokens`.
        rollout: the tag under rollout/ of the same metric on the rollouts that a model trains on.

    Returns:
        Columns model (its name); step, the number of its training's updates behind the value, 0 for a model that the
        run begins with; value; se (NaN where none is logged); kind: `evaluation` of the finished model, `validation`
        during its training, `rollout`.
    """
    rows = []
    for model in run.models:
        is_trained, name = run.parent(model) is not None, model.name
        for kind, folder in (("validation", name), ("evaluation", model.evaluation)):
            errors = dict(run.scalars(folder, f"eval/{metric}_se"))
            for step, value in run.scalars(folder, f"eval/{metric}") if is_trained or kind == "evaluation" else ():
                updates = step + 1 if kind == "validation" else num_steps(run, name)  # logged with the step before
                rows.append((name, updates if is_trained else 0, value, errors.get(step), kind))
        for step, value in run.scalars(name, f"rollout/{rollout}") if rollout and is_trained else ():
            rows.append((name, step, value, None, "rollout"))
    frame = pd.DataFrame(rows, columns=pd.Index(["model", "step", "value", "se", "kind"]))
    return frame.astype({"value": float, "se": float})


def teacher_syncs(run: RunFolder, stage: str) -> list[int]:
    """Return the numbers of updates after which the student of a stage became its teacher."""
    generations = run.scalars(stage, "teacher/generation")
    return [step + 1 for (_, before), (step, after) in pairwise(generations) if after > before]
