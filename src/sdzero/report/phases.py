"""Curves over both phases, from the base model over SRT to SD-Zero (figures 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pandas as pd

from sdzero.report.run_folder import MODELS, RunFolder

_PLACES = (  # (folder, phase, kind)
    ("base/eval", "base", "evaluation"),
    ("srt", "srt", "validation"),
    ("srt/eval", "srt", "evaluation"),
    ("self_distill", "self_distill", "validation"),
    ("self_distill/eval", "self_distill", "evaluation"),
)


def num_steps(run: RunFolder, stage: str) -> int:
    """Optimizer steps that a stage has logged; 0 where there is no such stage."""
    return max((step + 1 for step, _ in run.scalars(stage, "train/loss")), default=0)


def over_phases(run: RunFolder, figure: str, rollout: str | None = None) -> pd.DataFrame:
    """What the evaluations say of a figure, from the base model over SRT to SD-Zero.

    Args:
        run: a run, finished or not.
        figure: a tag under eval/, such as `response_tokens`.
        rollout: a tag under rollout/: the same of the rollouts that SelfDistill trains on.

    Returns:
        Columns phase (base, srt, self_distill); step, the number of the phase's updates behind the model; value; se
        (NaN where none is logged); kind: `evaluation` of a stage of its own, `validation` within training, `rollout`.
    """
    rows = []
    for folder, phase, kind in _PLACES:
        errors = dict(run.scalars(folder, f"eval/{figure}_se"))
        for step, value in run.scalars(folder, f"eval/{figure}"):
            updates = num_steps(run, phase) if kind == "evaluation" else step + 1  # logged with the step before it
            rows.append((phase, 0 if phase == "base" else updates, value, errors.get(step), kind))
    for step, value in run.scalars("self_distill", f"rollout/{rollout}") if rollout else ():
        rows.append(("self_distill", step, value, None, "rollout"))
    frame = pd.DataFrame(rows, columns=pd.Index(["phase", "step", "value", "se", "kind"]))
    return frame.astype({"value": float, "se": float})


def evaluations(run: RunFolder, figures: Sequence[str]) -> pd.DataFrame:
    """A row for each evaluated model (index: its folder), a column for each tag under eval/; NaN where not logged."""
    results = {model: run.results(model) for model in MODELS}
    rows = {model: [of_model.get(f"eval/{f}") for f in figures] for model, of_model in results.items() if of_model}
    return pd.DataFrame.from_dict(rows, orient="index", columns=pd.Index(figures), dtype=float)


def teacher_syncs(run: RunFolder) -> list[int]:
    """Numbers of SelfDistill's updates after which the student became the teacher."""
    generations = run.scalars("self_distill", "teacher/generation")
    return [step + 1 for (_, before), (step, after) in pairwise(generations) if after > before]
