"""Stages as processes: a recipe's entries with their inputs, folders and whole configs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from sdzero.engines import ENGINES
from sdzero.utils.recipe import RECIPE, Recipe, StageEntry, load_layer, load_recipe, place
from sdzero.utils.yaml_config import Config, flatten, get_value, load_config, merge, nest

RUNS = Path("runs")
STUDENT = "model.init_args.student.path"
OUTPUTS = {
    "fit": ("model", "questions-fit.json"),
    "collect": ("traces.jsonl", "questions.json", "statistics.json"),
    "test": ("results.json", "rewards.json", "questions-test.json"),
}
"""Command -> files and folders that a finished stage has left."""

Check = Callable[[str, Sequence[str]], Config]
"""Parses a stage's command and arguments into its whole config, and raises where a key is wrong."""


@dataclass(frozen=True)
class Options:
    """Options of `sdzero run` that change every stage; None leaves the recipe's value."""

    seed: int | None = None
    engine: str | None = None  # a key of ENGINES
    devices: int | None = None  # processes per node
    num_nodes: int | None = None


@dataclass(frozen=True)
class Stage:
    """One child process."""

    name: str  # of the stage, or `STAGE/eval`
    command: str  # `fit`, `test` or `collect`
    folder: Path  # that it writes
    settings: Config  # its config without `inputs` and folder
    inputs: dict[str, Path]  # config key -> file or folder that an earlier stage wrote
    sources: tuple[Path, ...]  # files that `settings` were merged from
    entry: StageEntry  # of the recipe; of an evaluation that of its model

    @property
    def engine_key(self) -> str:
        return "engine" if self.command == "collect" else "data.init_args.engine"

    @property
    def engine(self) -> str | None:
        """Class path of its rollout engine; None without one."""
        spec = get_value(self.settings, self.engine_key)
        return spec.get("class_path") if isinstance(spec, dict) else spec

    def identity(self) -> dict[str, Any]:
        """Flatten `settings`, without the keys that `inputs` take the place of."""
        return {key: value for key, value in flatten(self.settings).items() if key not in self.inputs}

    def to_yaml(self) -> str:
        """Dump the whole config, by which the stage also runs alone."""
        folder = "out" if self.command == "collect" else "trainer.default_root_dir"
        given = {folder: self.folder, **self.inputs}
        config = reduce(merge, (nest(key, str(path)) for key, path in given.items()), self.settings)
        return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)

    def with_options(self, options: Options) -> Stage:
        prefix = "" if self.command == "collect" else "trainer."
        values = {
            "seed_everything": options.seed,
            f"{prefix}devices": options.devices,
            f"{prefix}num_nodes": options.num_nodes,
            self.engine_key: {"class_path": ENGINES[options.engine]} if options.engine and self.engine else None,
        }
        given = (nest(key, value) for key, value in values.items() if value is not None)
        return replace(self, settings=reduce(merge, given, self.settings))


def list_stages(recipe: Recipe, out: Path, options: Options = Options()) -> list[Stage]:
    """List the stages of a recipe in order, each model's evaluation after it.

    Raises:
        FileNotFoundError: a stage's file is missing.
        ValueError: `shared` does not name the model to start from.
    """
    entries = {entry.name: entry for entry in recipe.entries}
    evaluation, evaluation_sources = recipe.compose(None)

    def written(name: str, file: str) -> Path:
        is_given = file == "model" and not entries[name].trains
        return Path(recipe.student_path()) if is_given else out / name / file

    stages: list[Stage] = []
    for entry in recipe.entries:
        if entry.trains:
            settings, sources = recipe.compose(entry)
            key = "student.path" if entry.command == "collect" else STUDENT
            inputs = {key: written(entry.starts_from, "model")} if entry.starts_from else {}
            inputs |= {key: written(*source.split("/", 1)) for key, source in entry.takes.items()}
            stages.append(Stage(entry.name, entry.command, out / entry.name, settings, inputs, sources, entry))
        if entry.has_model:
            name, inputs = entry.evaluation, {STUDENT: written(entry.name, "model")}
            stages.append(Stage(name, "test", out / name, evaluation, inputs, evaluation_sources, entry))
    return [stage.with_options(options) for stage in stages]


def parse(stages: Sequence[Stage], check: Check) -> dict[str, Config]:
    """Parse the stages' full configs, with all defaults. The evaluations share one: only their models differ.

    Raises:
        ArgumentError: a key is wrong; names the stage's files and the key.
    """
    parsed: dict[str, Config] = {}
    evaluation: Config | None = None
    for stage in stages:
        if stage.command == "test" and evaluation is not None:
            parsed[stage.name] = evaluation
            continue
        try:
            parsed[stage.name] = check(stage.command, ["--config", stage.to_yaml()])
        except argparse.ArgumentError as error:
            error.message = f"stage {stage.name} ({stage.sources[-1]}): {error.message}"
            raise
        if stage.command == "test":
            evaluation = parsed[stage.name]
    return parsed


def compose_arguments(command: str, arguments: Sequence[str]) -> list[str]:
    """Replace each `--config` that names a stage's file of a recipe by the stage's whole config.

    Its inputs and its folder are those of the recipe's default run folder, runs/RECIPE; the evaluation's file evaluates
    the last model.
    """
    composed = [*arguments]
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            composed[position] = f"--config={_compose_file(command, argument.removeprefix('--config='))}"
        elif position and arguments[position - 1] == "--config":
            composed[position] = _compose_file(command, argument)
    return composed


def _compose_file(command: str, value: str) -> str:
    if not value.endswith(".yaml") or not (file := Path(value)).with_name(RECIPE).is_file():
        return value
    layer = load_layer(file.parent)
    if not layer.content.keys() & {"stages", "extends"}:  # an overlay: it has no stages of its own
        return yaml.safe_dump(merge(place(layer.shared, command), load_config(file)), sort_keys=False)
    recipe = load_recipe(file.parent)
    out = RUNS / recipe.name
    named = [stage for stage in list_stages(recipe, out) if stage.command != "test" and stage.entry.file == file.name]
    if file.name == recipe.evaluation:
        named = [replace(list_stages(recipe, out)[-1], folder=out / "eval")]
    if len(named) > 1:
        names = ", ".join(stage.name for stage in named)
        raise ValueError(f"{value} is the file of several stages ({names}): `sdzero run {file.parent}` runs them")
    return named[0].to_yaml() if named else value
