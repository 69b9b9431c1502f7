"""lineage.json of a run: the recipe's stages and, of each stage that has started, its config, versions and hashes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdzero.utils.recipe import Model, StageEntry, list_models

FORMAT = 2
LINEAGE = "lineage.json"


@dataclass(frozen=True)
class Outline:
    """The recipe that a run was started with. Evaluations are not listed: each model has one."""

    name: str
    stages: tuple[StageEntry, ...]


@dataclass(frozen=True)
class Lineage:
    """Content of lineage.json."""

    recipe: Outline
    stages: dict[str, dict[str, Any]]
    """Records by stage, evaluations (`srt/eval`) included, in the order in which they started. A record has `config`
    (flat keys), `inputs` (hashes by config key) and `spent` (seconds); that of a finished stage also has `outputs`
    (hashes by file), `versions` and `seconds`."""

    @property
    def models(self) -> tuple[Model, ...]:
        """Models of the recipe in order, trained and evaluated yet or not."""
        return list_models(self.recipe.stages)

    @property
    def collections(self) -> tuple[StageEntry, ...]:
        """Stages that collect traces, in order."""
        return tuple(stage for stage in self.recipe.stages if stage.command == "collect")

    def unfinished(self) -> list[str]:
        """List the stages and evaluations that have not finished, in the order in which they run."""
        names = (name for stage in self.recipe.stages for name in stage.processes)
        return [name for name in names if "seconds" not in self.stages.get(name, {})]

    def to_json(self) -> str:
        recipe = {"name": self.recipe.name, "stages": [asdict(stage) for stage in self.recipe.stages]}
        return json.dumps({"format": FORMAT, "recipe": recipe, "stages": self.stages}, indent=2) + "\n"


def read_lineage(run: Path) -> Lineage:
    """Read the lineage of a run's folder. Without a lineage.json, each of its folders counts as a stage of its own.

    Raises:
        ValueError: lineage.json is damaged, or an older version of sdzero wrote it.
    """
    path = run / LINEAGE
    if not path.is_file():
        return Lineage(Outline(run.name, tuple(_guess_stages(run))), {})
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore a copy, or choose another --out. It records which stages have "
            "finished, with which config"
        ) from None
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has the layout of an older version of sdzero: read it with that one, or run again")
    recipe = content["recipe"]
    stages = tuple(StageEntry(**{**stage, "without": tuple(stage["without"])}) for stage in recipe["stages"])
    return Lineage(Outline(recipe["name"], stages), content["stages"])


def _guess_stages(run: Path) -> Iterator[StageEntry]:
    """List stages that were run one by one, in the order in which their last start wrote its config."""
    folders = [folder for folder in run.iterdir() if folder.is_dir()] if run.is_dir() else []
    starts = {folder: config.stat().st_mtime for folder in folders if (config := folder / "config.yaml").is_file()}
    before: str | None = None
    for folder in sorted(folders, key=lambda folder: (starts.get(folder, 0), folder.name)):
        is_collection = (folder / "traces.jsonl").exists() or (folder / "statistics.json").exists()
        command = "collect" if is_collection else "fit"
        yield StageEntry(folder.name, command, f"{folder.name}.yaml", folder.name, before)
        before = before if is_collection else folder.name
