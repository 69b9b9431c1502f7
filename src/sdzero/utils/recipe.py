"""Recipes: the stages that recipe.yaml lists, and the config that each is started with.

A stage's config is merged from layers, lowest first: the folder that the recipe extends, the recipe, and each overlay.
Every layer adds its `shared` values and then its file of the stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from graphlib import CycleError, TopologicalSorter
from os.path import normpath
from pathlib import Path
from typing import Any

from sdzero.utils.yaml_config import Config, expand, get_value, load_config, load_yaml, merge, nest

RECIPE = "recipe.yaml"
QUESTION_IDS = "questions.json"
SHARED = {
    "seed_everything": ("seed_everything", "seed_everything"),
    "student": ("model.init_args.student", "student"),
    "task": ("data.init_args.task", "task"),
    "engine": ("data.init_args.engine", "engine"),
    "engine_dtype": ("data.init_args.engine_dtype", "engine_dtype"),
    "max_logprob_gap": ("data.init_args.max_logprob_gap", None),
    "trainer": ("trainer", None),
}
"""Key of `shared` -> its place in a config of fit and test, and in one of collect."""


@dataclass(frozen=True)
class StageEntry:
    """An entry of `stages` in recipe.yaml."""

    name: str  # key of the entry, and the stage's folder in the run's folder
    command: str  # `fit` or `collect`
    file: str  # file of the stage's config
    label: str  # name of the stage's model in tables and plots
    starts_from: str | None = None  # stage of the model to start from; None: the model of `shared.student.path`
    takes: dict[str, str] = field(default_factory=dict)  # config key -> `STAGE/FILE` that an earlier stage writes
    without: tuple[str, ...] = ()  # keys of `shared` that the stage does not take
    trains: bool = True  # False: the entry stands for the model of `shared.student.path`

    @property
    def has_model(self) -> bool:
        return self.command == "fit"

    @property
    def evaluation(self) -> str:
        """Name of its model's evaluation, which is also its folder in the run's folder."""
        return f"{self.name}/eval"

    @property
    def processes(self) -> tuple[str, ...]:
        """Names of the processes that the entry stands for, in order."""
        return (*[self.name] * self.trains, *[self.evaluation] * self.has_model)


@dataclass(frozen=True)
class Model:
    """A model of a recipe. All are evaluated in the same way."""

    name: str  # stage that trains the model, or stands for it
    label: str  # its name in tables and plots
    starts_from: str | None  # name of the model it started from; None for the first
    cost_stages: tuple[str, ...]
    """Stages whose generations and tokens the model cost beyond the one it started from (table 3): its own, after the
    collections whose traces it learns from. Empty for a model that starts from none."""
    evaluation: str  # folder of its evaluation in the run's folder


def list_models(entries: Sequence[StageEntry]) -> tuple[Model, ...]:
    """List the models of a recipe's stages, in order."""
    collections: dict[str, list[str]] = {}  # by stage, those whose traces it learns from
    paid: dict[str | None, set[str]] = {}  # by model, those whose traces it and the models before it learned from
    has_model = {entry.name: entry.has_model for entry in entries}
    models: list[Model] = []
    for entry in entries:
        taken = (source.partition("/") for source in entry.takes.values())
        # question ids alone are not something to learn from
        sources = [name for name, _, file in taken if file != QUESTION_IDS and not has_model[name]]
        own = [*dict.fromkeys(each for name in sources for each in (*collections[name], name))]
        collections[entry.name] = own
        if entry.has_model:
            before = paid.get(entry.starts_from, set())
            paid[entry.name] = before | {*own}
            costs = (*(name for name in own if name not in before), entry.name) if entry.starts_from else ()
            models.append(Model(entry.name, entry.label, entry.starts_from, costs, entry.evaluation))
    return tuple(models)


@dataclass(frozen=True)
class Layer:
    """A folder of configs."""

    folder: Path
    content: Mapping[str, Any]  # its recipe.yaml; empty for an overlay without one
    shared: Config  # the recipe.yaml's `shared`, with the files it names in their place


@dataclass(frozen=True)
class Recipe:
    """A recipe with its overlays."""

    folder: Path
    layers: tuple[Layer, ...]  # lowest first
    entries: tuple[StageEntry, ...]  # stages in order
    evaluation: str  # file by which every model is evaluated

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def compose(self, entry: StageEntry | None) -> tuple[Config, tuple[Path, ...]]:
        """Merge the config of a stage (None: of the evaluation); return it and the files that it was merged from.

        Raises:
            FileNotFoundError: no layer has the stage's file.
            ValueError: a file is not valid YAML.
        """
        file, command = (entry.file, entry.command) if entry else (self.evaluation, "test")
        config: Config = {}
        sources: list[Path] = []
        for layer in self.layers:
            if shared := {key: value for key, value in layer.shared.items() if not entry or key not in entry.without}:
                config = merge(config, place(shared, command))
                sources.append(layer.folder / RECIPE)
            if (layer.folder / file).is_file():
                config = merge(config, load_config(layer.folder / file))
                sources.append(layer.folder / file)
        if not any(source.name == file for source in sources):
            where = f"stages.{entry.name}" if entry else "evaluation"
            raise FileNotFoundError(f"{self.folder / RECIPE}: {where}: there is no {self.folder / file}")
        return config, tuple(sources)

    def student_path(self) -> str:
        """Return the path of the model that the recipe starts from.

        Raises:
            ValueError: `shared` does not name it.
        """
        path = get_value(reduce(merge, (layer.shared for layer in self.layers), {}), "student.path")
        if path is None:
            raise ValueError(f"{self.folder / RECIPE}: shared.student.path is missing: the model to start from")
        return str(path)


def place(shared: Config, command: str) -> Config:
    """Put the values of `shared` under the keys of a command's config."""
    pairs = ((SHARED[key][command == "collect"], value) for key, value in shared.items())
    return reduce(merge, (nest(key, value) for key, value in pairs if key is not None), {})


def load_recipe(folder: Path, overlays: Sequence[Path] = ()) -> Recipe:
    """Read a recipe.yaml and those of its overlays. The stages' files are read by `Recipe.compose`.

    Args:
        folder: folder with a recipe.yaml.
        overlays: folders whose files are merged over the recipe's, in this order. The `stages` of an overlay replace
            the recipe's; an entry without a value is taken from there.

    Raises:
        FileNotFoundError: a folder or the recipe.yaml is missing.
        ValueError: a recipe.yaml or an overlay is wrong; names the file and the key.
    """
    if not (folder / RECIPE).is_file():
        raise FileNotFoundError(f"{folder} is not a recipe: it has no {RECIPE}")
    layers = [*_load_extended(folder), *map(load_layer, overlays)]
    evaluation, raw, listed_in, known_files = "eval.yaml", {}, layers[0], {RECIPE}
    for layer in layers:
        file = layer.folder / RECIPE
        given = _check_mapping(layer.content.get("evaluation"), f"{file}: evaluation", ("file",))
        evaluation = given.get("file", evaluation)
        if stages := _check_mapping(layer.content.get("stages"), f"{file}: stages"):
            raw = {name: raw.get(name, {}) if values is None else values for name, values in stages.items()}
            listed_in = layer
        entries = _parse_entries(raw, listed_in)
        known_files |= {evaluation, *(entry.file for entry in entries if entry.trains)}
    if not raw:
        raise ValueError(f"{folder / RECIPE}: stages is missing: it lists the recipe's stages")
    for overlay in overlays:
        _check_overlay(overlay, known_files)
    return Recipe(folder, tuple(layers), entries, evaluation)


def load_layer(folder: Path) -> Layer:
    """Read a folder's recipe.yaml, if it has one."""
    file = folder / RECIPE
    keys = ("extends", "shared", "evaluation", "stages")
    content = _check_mapping(load_yaml(file) if file.is_file() else None, str(file), keys)
    return Layer(folder, content, expand(_check_mapping(content.get("shared"), f"{file}: shared", SHARED), folder))


def _load_extended(folder: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """Read the layers of a recipe: the folders that it extends, lowest first, and its own."""
    if folder in above:
        raise ValueError(f"{folder / RECIPE}: extends: the folders extend each other")
    layer = load_layer(folder)
    if (below := layer.content.get("extends")) is None:
        return [layer]
    beneath = Path(normpath(folder / str(below)))
    if not (beneath / RECIPE).is_file():
        raise FileNotFoundError(f"{folder / RECIPE}: extends: there is no {beneath / RECIPE}")
    return [*_load_extended(beneath, (*above, folder)), layer]


def _check_mapping(values: Any, where: str, known: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the mapping `values`, empty for None.

    Raises:
        ValueError: it is not a mapping, or has an unknown key.
    """
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be a mapping, got {values!r}")
    if unknown := [key for key in values if known is not None and key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]}; the keys are {', '.join(known or ())}")
    return values


def _parse_entries(raw: Mapping[str, Any], layer: Layer) -> tuple[StageEntry, ...]:
    entries: list[StageEntry] = []
    for name, values in raw.items():
        where = f"{layer.folder / RECIPE}: stages.{name}"
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise ValueError(f"{where}: a stage's name has letters, digits, - and _ only")
        trains = not isinstance(values, dict) or values.get("trains", True)
        keys = ("command", "file", "label", "starts_from", "takes", "without", "trains")
        given = _check_mapping(values, where, keys if trains else ("label", "trains"))
        entry = StageEntry(
            name=name,
            command=given.get("command", "fit"),
            file=given.get("file", f"{name}.yaml"),
            label=str(given.get("label", name)),
            starts_from=given.get("starts_from", next((e.name for e in reversed(entries) if e.has_model), None)),
            takes=_check_mapping(given.get("takes"), f"{where}.takes"),
            without=tuple(given.get("without") or ()),
            trains=bool(trains),
        )
        if entry.command not in ("fit", "collect"):
            raise ValueError(f"{where}.command: must be fit or collect, got {entry.command!r}")
        if unknown := [key for key in entry.without if key not in SHARED]:
            raise ValueError(f"{where}.without: unknown key {unknown[0]}; the keys are {', '.join(SHARED)}")
        entries.append(entry if trains else StageEntry(name, "fit", "", entry.label, trains=False))
    _check_references(entries, f"{layer.folder / RECIPE}: stages")
    return tuple(entries)


def _check_references(entries: Sequence[StageEntry], where: str) -> None:
    """Raise ValueError if a stage needs an unknown or a later one, or if two models have the same label."""
    by_name = {entry.name: entry for entry in entries}
    needs = {
        e.name: [*filter(None, [e.starts_from]), *(s.partition("/")[0] for s in e.takes.values())] for e in entries
    }
    for name, needed in needs.items():
        if unknown := [other for other in needed if other not in by_name]:
            raise ValueError(f"{where}.{name}: there is no stage {unknown[0]}; the stages are {', '.join(by_name)}")
        if (start := by_name[name].starts_from) and not by_name[start].has_model:
            raise ValueError(f"{where}.{name}.starts_from: {start} is a collection and has no model")
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        raise ValueError(f"{where}: a loop: {' needs '.join(reversed(error.args[1]))}") from None
    order = [*by_name]
    for name, needed in needs.items():
        if later := [other for other in needed if order.index(other) > order.index(name)]:
            raise ValueError(f"{where}.{name}: needs {later[0]}, which is listed after it: list it before")
    labels = [entry.label for entry in entries if entry.has_model]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"{where}: two models have the label {twice[0]!r}")


def _check_overlay(folder: Path, known: set[str]) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"--overlay {folder}: there is no such folder")
    files = sorted(file.name for file in folder.glob("*.yaml"))
    if unknown := [name for name in files if name not in known]:
        raise ValueError(
            f"--overlay {folder}: {unknown[0]} is not one of {', '.join(sorted(known))}: rename or move it"
        )
    if not files:
        raise ValueError(f"--overlay {folder}: it has none of {', '.join(sorted(known))}")
