"""Reader of a run's folder. Whatever the run has not written (yet) comes back empty."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from sdzero.pipeline.summary import read_json
from sdzero.utils.lineage import read_lineage
from sdzero.utils.recipe import Model

Curves = dict[str, dict[int, float]]
"""Tag -> step -> value."""


class RunFolder:
    """Folder of `sdzero run`, finished or not; or of single stages, one folder each.

    Attributes:
        path: the folder.
        lineage: the recipe's stages, and the record of each that has started.
        models: the run's models in the order of the recipe, whether or not they are trained yet.

    Raises:
        FileNotFoundError: the folder does not exist or holds no stage.
        ValueError: lineage.json is damaged or of an older layout.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lineage = read_lineage(self.path)
        self.models = self.lineage.models
        self._curves: dict[str, Curves] = {}
        if not self.lineage.recipe.stages:
            raise FileNotFoundError(
                f"{self.path} is not the folder of a run: it holds no lineage.json and no stage. "
                "`sdzero run RECIPE_DIR --out FOLDER` writes one"
            )

    def parent(self, model: Model) -> Model | None:
        """Return the model of this run that another one starts from; None where it starts from outside the run."""
        return next((other for other in self.models if other.name == model.starts_from), None)

    def configs(self) -> list[dict[str, Any]]:
        """Return the flat configs of the stages that have started."""
        return [record["config"] for record in self.lineage.stages.values()]

    def scalars(self, stage: str, tag: str) -> list[tuple[int, float]]:
        """Return (step, value) of a curve without NaN; where a stage was restarted, the later values count."""
        return sorted(self._load(stage).get(tag, {}).items())

    def tags(self, stage: str) -> list[str]:
        return sorted(self._load(stage))

    def _load(self, stage: str) -> Curves:
        if stage not in self._curves:
            self._curves[stage] = _read_events(self.path / stage)
        return self._curves[stage]

    def results(self, model: Model) -> dict[str, float | None]:
        """Return the metrics of a model's evaluation by tag."""
        return read_json(self.path / model.evaluation / "results.json")

    def samples(self, stage: str, kind: Literal["train", "eval"] = "eval") -> list[dict[str, Any]]:
        """Return the rows of SampleWriter in order of steps. Of an evaluation, only each question's first answer: all
        of them may not fit into memory."""
        rows: list[dict[str, Any]] = []
        for path in sorted((self.path / stage / "samples").glob(f"{kind}-*.jsonl")):
            with path.open() as file:
                rows += (row for row in map(json.loads, file) if kind == "train" or not row.get("sample"))
        return rows

    def token_kl(self, stage: str, kind: Literal["train", "eval", "*"] = "*") -> pd.DataFrame:
        """Return the rows of TokenKLRecorder, one per response, in order of steps."""
        files = sorted((self.path / stage / "token_kl").glob(f"{kind}-*.parquet"))
        return pd.concat(map(pd.read_parquet, files), ignore_index=True) if files else pd.DataFrame()

    def token_kl_stage(self) -> str:
        """Return the last stage that recorded token KL, else the last one of all."""
        stages = [stage.name for stage in reversed(self.lineage.recipe.stages)]
        return next((stage for stage in stages if any((self.path / stage / "token_kl").glob("*.parquet"))), stages[0])


def _read_events(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: Curves = {}
    for file in sorted(folder.glob("events*"), key=lambda f: f.stat().st_mtime_ns):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            points = events.Scalars(tag)
            first = points[0].step if points else math.inf  # a restart repeats the steps after its checkpoint
            curves[tag] = {step: value for step, value in curves.get(tag, {}).items() if step < first}
            curves[tag].update((point.step, point.value) for point in points if not math.isnan(point.value))
    return curves
