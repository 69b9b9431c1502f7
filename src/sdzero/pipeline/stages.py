"""The stages of a recipe, and what each is called with: its config, what is laid over it, and the command line's word.

base -> base/eval -> collect -> srt -> srt/eval -> self_distill -> self_distill/eval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

ENGINES = {"vllm": "sdzero.engines.VLLMEngine", "transformers": "sdzero.engines.TransformersEngine"}
FIT_MODEL = "model.init_args.student.path"
DISJOINT_FROM = "data.init_args.disjoint_from"
TRAINED, EVALUATED = ("model", "questions-fit.json"), ("results.json", "rewards.json", "questions-test.json")
"""What a training and an evaluation leave behind."""
NAMES = ("collect", "srt", "self_distill", "eval")
"""The files of a recipe, and of an overlay, without their ending."""


@dataclass(frozen=True)
class Choices:
    """What the command line says beside the recipe.

    Args:
        overlays: folders whose files are laid over the recipe's, in this order.
        phase2_only: leave out collection and SRT, so that SelfDistill starts from the base (table 12).
        seed: the run's seed; None leaves the recipe's.
        engine: a key of ENGINES; None leaves the recipe's engine.
        devices: processes per node of every stage; None leaves the recipe's.
        num_nodes: nodes of every stage; None leaves the recipe's.
    """

    overlays: tuple[Path, ...] = ()
    phase2_only: bool = False
    seed: int | None = None
    engine: str | None = None
    devices: int | None = None
    num_nodes: int | None = None


@dataclass(frozen=True)
class Stage:
    """One child process.

    Attributes:
        name: folder of the stage in the run's folder.
        command: `fit`, `test` or `collect`.
        config: YAML file of the recipe.
        overlays: YAML files laid over it, in order.
        inputs: config key -> file or folder that an earlier stage wrote.
        outputs: what must be there when it has finished, relative to its folder.
        settings: config key -> value that the command line or the choice of stages gives it.
    """

    name: str
    command: str
    config: Path
    overlays: tuple[Path, ...] = ()
    inputs: dict[str, Path] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """The config as flat `a.b.c: value` pairs, overlays and settings in it."""
        return {**resolved(self.config, *self.overlays), **self.settings}

    def arguments(self, folder: Path) -> list[str]:
        """Of its command, to have it write into `folder`."""
        options = {key: str(path) for key, path in self.inputs.items()}
        options |= {"out": str(folder)} if self.command == "collect" else {"trainer.default_root_dir": str(folder)}
        # a class named for a whole value takes the place of the recipe's
        options |= {k.removesuffix(".class_path"): "null" if v is None else str(v) for k, v in self.settings.items()}
        configs = [argument for file in (self.config, *self.overlays) for argument in ("--config", str(file))]
        return [*configs, *(f"--{key}={value}" for key, value in options.items())]

    def engine_key(self) -> str | None:
        """The key that names the class of the stage's rollout engine; None for a stage without one."""
        prefix, config = "engine" if self.command == "collect" else "data.init_args.engine", self.resolved()
        return next((key for key in (f"{prefix}.class_path", prefix) if key in config), None)

    def chosen(self, choices: Choices) -> Stage:
        """The stage with what the command line says of every one."""
        settings = {**self.settings}
        if choices.seed is not None:
            settings["seed_everything"] = choices.seed
        if choices.engine is not None and (key := self.engine_key()):
            settings[key] = ENGINES[choices.engine]
        where = {"devices": choices.devices, "num_nodes": choices.num_nodes}
        prefix = "" if self.command == "collect" else "trainer."
        settings |= {f"{prefix}{key}": value for key, value in where.items() if value is not None}
        return replace(self, settings=settings)


def stages(recipe: Path, out: Path, choices: Choices = Choices()) -> list[Stage]:
    """The stages of a recipe in order.

    Raises:
        FileNotFoundError: the folder lacks one of collect.yaml, srt.yaml, self_distill.yaml, eval.yaml, or an overlay
            is no folder.
        ValueError: an overlay holds none of these files, or another one.
    """
    for name in NAMES:
        if not (recipe / f"{name}.yaml").is_file():
            raise FileNotFoundError(f"{recipe} is not a recipe: it has no {name}.yaml")
    for overlay in choices.overlays:
        _check_overlay(overlay)

    def stage(name: str, command: str, inputs: Mapping[str, Path], *outputs: str, **settings: Any) -> Stage:
        file = f"{'eval' if command == 'test' else name}.yaml"
        overlays = tuple(overlay / file for overlay in choices.overlays if (overlay / file).is_file())
        return Stage(name, command, recipe / file, overlays, dict(inputs), outputs, settings).chosen(choices)

    def evaluation(name: str, model: Path) -> Stage:
        return stage(f"{name}/eval", "test", {FIT_MODEL: model}, *EVALUATED)

    collect = stage("collect", "collect", {}, "traces.jsonl", "questions.json", "statistics.json")
    has_base = (recipe / "base.yaml").is_file()
    base = out / "base/model" if has_base else Path(_model_path(collect))
    srt, self_distill = out / "srt/model", out / "self_distill/model"
    plan = [stage("base", "fit", {}, *TRAINED)] if has_base else []
    plan += [evaluation("base", base)]
    if choices.phase2_only:
        plan += [stage("self_distill", "fit", {FIT_MODEL: base}, *TRAINED, **{DISJOINT_FROM: None})]
    else:
        traces = out / "collect/traces.jsonl"
        plan += [
            replace(collect, inputs={"student.path": base}),
            stage("srt", "fit", {FIT_MODEL: base, "data.init_args.source.init_args.path": traces}, *TRAINED),
            evaluation("srt", srt),
            stage("self_distill", "fit", {FIT_MODEL: srt, DISJOINT_FROM: out / "collect/questions.json"}, *TRAINED),
        ]
    return [*plan, evaluation("self_distill", self_distill)]


def _check_overlay(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"--overlay {folder}: there is no such folder")
    wanted = [f"{name}.yaml" for name in NAMES]
    files = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    if unknown := [name for name in files if name not in wanted]:
        raise ValueError(f"--overlay {folder}: {unknown[0]} is none of {', '.join(wanted)}: rename it or move it away")
    if not files:
        raise ValueError(f"--overlay {folder}: it has none of {', '.join(wanted)}")


def _model_path(collect: Stage) -> str:
    values = collect.resolved()
    if "student.path" not in values:
        raise ValueError(
            f"{collect.config}: student.path is missing, and the recipe has no base.yaml that trains a base model"
        )
    return str(values["student.path"])


def resolved(*paths: Path) -> dict[str, Any]:
    """A config as flat `a.b.c: value` pairs, with the YAML files it names put in their place; later files change the
    keys that they name.

    Raises:
        ValueError: a file is not YAML; names the place.
    """
    merged: Any = {}
    for path in paths:
        merged = _merge(merged, _expand(_load(path), path.parent))

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        flat = [walk(f"{prefix}.{key}" if prefix else str(key), item) for key, item in items]
        return {k: v for part in flat for k, v in part.items()} if flat else {prefix: value}

    return walk("", merged)


def _expand(value: Any, folder: Path) -> Any:
    """The value with the YAML files it names, relative to the file that names them, in their place."""
    if isinstance(value, str) and value.endswith(".yaml") and (folder / value).is_file():
        return _expand(_load(folder / value), (folder / value).parent)
    if isinstance(value, dict):
        return {key: _expand(item, folder) for key, item in value.items()}
    return [_expand(item, folder) for item in value] if isinstance(value, list) else value


def _merge(below: Any, above: Any) -> Any:
    """As a second `--config` does it: keys are changed one by one, lists as a whole."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merge(below[key], item) if key in below else item for key, item in above.items()}}


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
