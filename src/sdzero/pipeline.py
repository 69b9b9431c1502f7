"""`sdzero run RECIPE_DIR`: base -> collect -> SRT -> SelfDistill, each model evaluated, from one folder of configs.

Each stage is a child process. A finished stage is skipped if its resolved config and its inputs are the ones
that lineage.json names; a stage that was interrupted goes on from its newest good checkpoint.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import yaml

from sdzero import __version__
from sdzero.summary import print_table, summarize

PACKAGES = ("torch", "lightning", "transformers")
ENGINES = {"vllm": "sdzero.engines.VLLMEngine", "transformers": "sdzero.engines.TransformersEngine"}
FIT_MODEL = "model.init_args.model.path"
LOCK_SECONDS = 3.0
"""A stage whose `sdzero run` was killed takes a moment to notice, and holds the folder's lock until it has ended."""

Check = Callable[[str, Sequence[str]], None]
"""Parses a stage's command and arguments, and raises where a key is wrong."""


@dataclass(frozen=True)
class Stage:
    """One child process.

    Attributes:
        name: folder of the stage in the run's folder.
        command: `fit`, `test` or `collect`.
        config: YAML file of the recipe.
        inputs: config key -> file or folder that an earlier stage wrote.
        outputs: what must be there when it has finished, relative to its folder.
    """

    name: str
    command: str
    config: Path
    inputs: dict[str, Path] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


def stages(recipe: Path, out: Path) -> list[Stage]:
    """The stages of a recipe in order.

    Raises:
        FileNotFoundError: the folder lacks one of collect.yaml, srt.yaml, self_distill.yaml, eval.yaml.
    """
    for name in ("collect", "srt", "self_distill", "eval"):
        if not (recipe / f"{name}.yaml").is_file():
            raise FileNotFoundError(f"{recipe} is not a recipe: it has no {name}.yaml")
    trained: list[Stage] = []
    if (recipe / "base.yaml").is_file():
        trained.append(Stage("base", "fit", recipe / "base.yaml", {}, ("model",)))
        base = out / "base/model"
    else:
        base = Path(_required(recipe / "collect.yaml", "model.path"))

    def evaluation(name: str, model: Path) -> Stage:
        return Stage(f"{name}/eval", "test", recipe / "eval.yaml", {FIT_MODEL: model}, ("results.json", "rewards.json"))

    srt, self_distill = out / "srt/model", out / "self_distill/model"
    srt_inputs = {FIT_MODEL: base, "data.init_args.source.init_args.path": out / "collect/traces.jsonl"}
    sd_inputs = {FIT_MODEL: srt, "data.init_args.disjoint_from": out / "collect/questions.json"}
    collected = ("traces.jsonl", "questions.json", "statistics.json")
    return [
        *trained,
        evaluation("base", base),
        Stage("collect", "collect", recipe / "collect.yaml", {"model.path": base}, collected),
        Stage("srt", "fit", recipe / "srt.yaml", srt_inputs, ("model",)),
        evaluation("srt", srt),
        Stage("self_distill", "fit", recipe / "self_distill.yaml", sd_inputs, ("model",)),
        evaluation("self_distill", self_distill),
    ]


def _required(config: Path, key: str) -> str:
    values = resolved(config)
    if key not in values:
        raise ValueError(f"{config}: {key} is missing, and the recipe has no base.yaml that trains a base model")
    return str(values[key])


def resolved(path: Path) -> dict[str, Any]:
    """A config as flat `a.b.c: value` pairs, with the YAML files it names put in their place.

    Raises:
        ValueError: a file is not YAML; names the place.
    """

    def walk(prefix: str, value: Any, folder: Path) -> dict[str, Any]:
        if isinstance(value, str) and value.endswith(".yaml") and (folder / value).is_file():
            return walk(prefix, _load(folder / value), (folder / value).parent)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        flat = [walk(f"{prefix}.{key}" if prefix else str(key), item, folder) for key, item in items]
        return {k: v for part in flat for k, v in part.items()} if flat else {prefix: value}

    return walk("", _load(path), path.parent)


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def content_sha256(path: Path) -> str:
    """Hash of an input: of the weights of a model folder, of the bytes of a file. A hub id stands for itself."""
    if path.is_dir():
        from sdzero.models import folder_sha256  # brings torch, which --help does without

        return folder_sha256(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)


class Run:
    """The run's folder with its lineage.json: per finished stage its config, versions and hashes."""

    def __init__(self, recipe: Path, out: Path, seed: int | None, engine: str | None, lock: IO[str]) -> None:
        self.recipe, self.out, self.seed, self.engine, self.lock = recipe, out, seed, engine, lock
        self.lineage_path = out / "lineage.json"
        self.lineage: dict[str, Any] = {}
        if self.lineage_path.is_file():
            self.lineage = json.loads(self.lineage_path.read_text())

    def execute(self, check: Check) -> None:
        plan = stages(self.recipe, self.out)
        if not self.lineage:  # a wrong key in the last stage must not show after the first has run for hours
            for stage in plan:
                self._check_engine(stage)
                check(stage.command, self._arguments(stage))
        for number, stage in enumerate(plan, 1):
            title = f"[{number}/{len(plan)}] {stage.name}"
            if self._finished(stage):
                print(f"{title}: finished before", flush=True)
                continue
            print(f"{title}: {stage.command} {stage.config}", flush=True)
            self._execute(stage)
        from sdzero.rollouts import write_text  # brings torch

        summary = summarize(self.out, self.lineage)
        write_text(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_table(summary)
        print(f"\ncurves: tensorboard --logdir {self.out}\nfigures: {self.out / 'summary.json'}")
        print(f"report: sdzero report {self.out}")

    def _config(self, stage: Stage) -> dict[str, Any]:
        """The stage's resolved config with this run's seed and engine in it."""
        seed = {} if self.seed is None else {"seed_everything": self.seed}
        config = {**resolved(stage.config), **seed}
        if self.engine is not None and (key := _engine_key(stage, config)):
            config[key] = ENGINES[self.engine]
        return config

    def _check_engine(self, stage: Stage) -> None:
        config = self._config(stage)
        key = _engine_key(stage, config)
        if key and config[key] == ENGINES["vllm"] and find_spec("vllm") is None:
            raise ValueError(
                f'{stage.config}: {key}: vLLM is not installed: pip install "sdzero[cuda]" (or "sdzero[cpu]"), '
                "or take --engine transformers"
            )

    def _identity(self, stage: Stage) -> dict[str, Any]:
        config = self._config(stage)
        named = {key: file for key, value in config.items() if (file := _local_file(value)) is not None}
        files = {**stage.inputs, **{key: file for key, file in named.items() if key not in stage.inputs}}
        return {"config": config, "inputs": {key: content_sha256(path) for key, path in files.items()}}

    def _finished(self, stage: Stage) -> bool:
        """Raises: ValueError naming the changed key where the stage started or finished with another config."""
        record = self.lineage.get(stage.name)
        if record is None or not (self.out / stage.name).is_dir():
            return False
        now = self._identity(stage)
        for what in ("config", "inputs"):
            before, after = record[what], json.loads(json.dumps(now[what]))
            changed = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
            if changed:
                raise ValueError(
                    f"stage {stage.name} of {self.out} ran with other {what}: {', '.join(changed)} changed. "
                    f"Take another --out, or remove {self.out / stage.name} to have it made again"
                )
        return "seconds" in record and all((self.out / stage.name / o).exists() for o in stage.outputs)

    def _execute(self, stage: Stage) -> None:
        folder = self.out / stage.name
        spent = self.lineage.get(stage.name, {}).get("spent", 0.0)
        # written before the stage starts, so that a restart with another config is noticed too
        self._record(stage, {**self._identity(stage), "spent": spent})
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "sdzero", stage.command, *self._arguments(stage), *_going_on(stage, folder)]
        environment = {**os.environ, "SDZERO_PARENT": str(os.getpid())}
        started = time.monotonic()
        # the child holds the lock too: where this process is killed, no other run starts before the child has ended
        code = subprocess.run(command, env=environment, pass_fds=[self.lock.fileno()], check=False).returncode
        spent += time.monotonic() - started
        self._record(stage, {**self.lineage[stage.name], "spent": spent})
        if code:
            sys.exit(f"sdzero run: stage {stage.name} ended with exit code {code}; its command:\n{shlex.join(command)}")
        outputs = {o: content_sha256(folder / o) for o in stage.outputs}
        versions = {"sdzero": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
        self._record(stage, {**self.lineage[stage.name], "outputs": outputs, "versions": versions, "seconds": spent})

    def _record(self, stage: Stage, record: dict[str, Any]) -> None:
        from sdzero.rollouts import write_text  # brings torch

        self.lineage[stage.name] = record
        write_text(self.lineage_path, json.dumps(self.lineage, indent=2) + "\n")

    def _arguments(self, stage: Stage) -> list[str]:
        folder = self.out / stage.name
        options = {key: str(path) for key, path in stage.inputs.items()}
        options |= {"out": str(folder)} if stage.command == "collect" else {"trainer.default_root_dir": str(folder)}
        if self.seed is not None:
            options["seed_everything"] = str(self.seed)
        if self.engine is not None and (key := _engine_key(stage, resolved(stage.config))):
            options[key.removesuffix(".class_path")] = ENGINES[self.engine]
        return ["--config", str(stage.config), *(f"--{key}={value}" for key, value in options.items())]


def _local_file(value: Any) -> Path | None:
    """The user's own file that a config's value names: by its path, or as the module of a class_path."""
    if not isinstance(value, str):
        return None
    module = value.rpartition(".")[0].replace(".", "/") + ".py"
    return next((Path(name) for name in (value, module) if os.path.isfile(name)), None)  # a prompt is no path either


def _engine_key(stage: Stage, config: dict[str, Any]) -> str | None:
    """The key that names the class of the stage's rollout engine; None for a stage without one."""
    prefix = "engine" if stage.command == "collect" else "data.init_args.engine"
    return next((key for key in (f"{prefix}.class_path", prefix) if key in config), None)


def _going_on(stage: Stage, folder: Path) -> list[str]:
    """The option that lets an interrupted training go on from its newest good checkpoint."""
    if stage.command != "fit" or not (folder / "checkpoints").is_dir():
        return []
    from sdzero.checkpoints import newest_checkpoint  # brings Lightning

    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        return []
    print(f"going on from {checkpoint}", flush=True)
    return [f"--ckpt_path={checkpoint}"]


def _acquire(lock: IO[str], out: Path) -> None:
    """Raises: ValueError where another run holds the folder."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(f"another run is at work in {out}: wait for its end, or take another --out") from None
        time.sleep(0.1)


def main(arguments: list[str], check: Check) -> None:
    parser = argparse.ArgumentParser(
        prog="sdzero run", description="Runs a recipe's stages in order; call it again to go on."
    )
    parser.add_argument("recipe", type=Path, help="folder with collect.yaml, srt.yaml, self_distill.yaml, eval.yaml")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--seed", type=int, help="the run's seed (default: the recipe's seed_everything)")
    parser.add_argument("--engine", choices=sorted(ENGINES), help="another rollout engine than the recipe's")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs") / options.recipe.resolve().name
    stages(options.recipe, out)  # a folder that is no recipe leaves nothing behind
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        _acquire(lock, out)
        Run(options.recipe, out, options.seed, options.engine, lock).execute(check)
