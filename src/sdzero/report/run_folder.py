"""Reads what the stages of a run left in its folder. What is not there (yet) comes back empty."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from sdzero.data.trace_file import read_traces
from sdzero.types import Trace
from sdzero.utils.lineage import read_lineage

MODELS = {"base": "base", "srt": "SRT", "self_distill": "SD-Zero"}
"""Folder of each model in a run -> its name in figures."""


class RunFolder:
    """The folder of `sdzero run`, finished or not; or of single stages, one folder each.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of a run in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not any((self.path / name).is_dir() for name in (*MODELS, "collect")):
            raise FileNotFoundError(
                f"{self.path} is not the folder of a run: it has none of {', '.join((*MODELS, 'collect'))}. "
                "`sdzero run RECIPE_DIR --out FOLDER` makes one"
            )

    def scalars(self, stage: str, tag: str) -> list[tuple[int, float]]:
        """(step, value) of a curve, without the steps that had nothing to count from. Where a stage was started again,
        the later start's values count."""
        return sorted(self._curves(stage).get(tag, {}).items())

    def tags(self, stage: str) -> list[str]:
        return sorted(self._curves(stage))

    def _curves(self, stage: str) -> dict[str, dict[int, float]]:
        if stage not in self._loaded:
            self._loaded[stage] = _read_events(self.path / stage)
        return self._loaded[stage]

    @cached_property
    def _loaded(self) -> dict[str, dict[str, dict[int, float]]]:
        return {}

    def summary(self) -> list[dict[str, Any]]:
        """The table of the run, one object per model."""
        return self._json("summary.json") or []

    def lineage(self) -> dict[str, Any]:
        return read_lineage(self.path).stages

    def results(self, model: str) -> dict[str, float | None]:
        """The figures of a model's evaluation, by tag."""
        return self._json(f"{model}/eval/results.json") or {}

    def statistics(self) -> dict[str, Any]:
        """Collection's statistics."""
        return self._json("collect/statistics.json") or {}

    def _json(self, name: str) -> Any:
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else None

    def traces(self) -> list[Trace]:
        """D_revision."""
        file = self.path / "collect/traces.jsonl"
        return read_traces(file) if file.is_file() else []

    def samples(self, stage: str, kind: Literal["train", "eval"] = "eval") -> list[dict[str, Any]]:
        """What SampleWriter left in a stage, in the order of the steps; of an evaluation the first answers to its
        questions, for all of them may not fit into memory."""
        rows: list[dict[str, Any]] = []
        for path in sorted((self.path / stage / "samples").glob(f"{kind}-*.jsonl")):
            with path.open() as file:
                rows += (row for row in map(json.loads, file) if kind == "train" or not row.get("sample"))
        return rows

    def token_kl(self, stage: str = "self_distill", kind: Literal["train", "eval", "*"] = "*") -> pd.DataFrame:
        """What TokenKLRecorder left in a stage, one row a response: of evaluations, of training, in order of steps."""
        files = sorted((self.path / stage / "token_kl").glob(f"{kind}-*.parquet"))
        return pd.concat(map(pd.read_parquet, files), ignore_index=True) if files else pd.DataFrame()


def _read_events(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events*"), key=lambda f: f.stat().st_mtime_ns):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            curve = curves.setdefault(tag, {})
            points = events.Scalars(tag)
            if points:  # a restart repeats the steps after its checkpoint
                curve = curves[tag] = {step: value for step, value in curve.items() if step < points[0].step}
            curve.update((point.step, point.value) for point in points if not math.isnan(point.value))
    return curves
