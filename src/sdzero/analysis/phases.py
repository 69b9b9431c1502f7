"""Curves over both phases on one axis: the steps of SRT, then those of SelfDistill (figures 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pandas as pd

from sdzero.analysis.run import MODELS, RunFolder

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
        Columns step (0 is the base model, SRT's last step is SelfDistill's 0), value, se (NaN where none is logged),
        phase (base, srt, self_distill) and kind: `evaluation` of a stage of its own, `validation` within training,
        `rollout`.
    """
    ends = {"base": 0, "srt": num_steps(run, "srt")}
    ends["self_distill"] = ends["srt"] + num_steps(run, "self_distill")
    begins = {"srt": 0, "self_distill": ends["srt"]}
    rows = []
    for folder, phase, kind in _PLACES:
        errors = dict(run.scalars(folder, f"eval/{figure}_se"))
        for step, value in run.scalars(folder, f"eval/{figure}"):
            at = ends[phase] if kind == "evaluation" else begins[phase] + step + 1  # logged with the step before it
            rows.append((at, value, errors.get(step), phase, kind))
    for step, value in run.scalars("self_distill", f"rollout/{rollout}") if rollout else ():
        rows.append((begins["self_distill"] + step, value, None, "self_distill", "rollout"))
    frame = pd.DataFrame(rows, columns=pd.Index(["step", "value", "se", "phase", "kind"]))
    return frame.astype({"value": float, "se": float})


def evaluations(run: RunFolder, figures: Sequence[str]) -> pd.DataFrame:
    """A row for each evaluated model (index: its folder), a column for each tag under eval/; NaN where not logged."""
    results = {model: run.results(model) for model in MODELS}
    rows = {model: [of_model.get(f"eval/{f}") for f in figures] for model, of_model in results.items() if of_model}
    return pd.DataFrame.from_dict(rows, orient="index", columns=pd.Index(figures), dtype=float)


def teacher_syncs(run: RunFolder) -> list[int]:
    """Steps of SelfDistill from which a new teacher counts, the student of that step."""
    generations = run.scalars("self_distill", "teacher/generation")
    return [step for (_, before), (step, after) in pairwise(generations) if after > before]
