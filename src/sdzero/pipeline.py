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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from sdzero import __version__
from sdzero.checkpoints import newest_checkpoint
from sdzero.models import folder_sha256
from sdzero.rollouts import write_text
from sdzero.summary import print_table, summarize

PACKAGES = ("torch", "lightning", "transformers")
ENGINES = {"vllm": "sdzero.engines.VLLMEngine", "transformers": "sdzero.engines.TransformersEngine"}


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
    base_model: dict[str, Path] = {}
    if (recipe / "base.yaml").is_file():
        trained.append(Stage("base", "fit", recipe / "base.yaml", {}, ("model",)))
        base_model = {"model": out / "base/model"}
    collected = ("traces.jsonl", "questions.json", "statistics.json")
    collect = Stage("collect", "collect", recipe / "collect.yaml", _keys(base_model, "model.path"), collected)
    srt_inputs = {**_keys(base_model, FIT_MODEL), "data.init_args.source.init_args.path": out / "collect/traces.jsonl"}
    srt = Stage("srt", "fit", recipe / "srt.yaml", srt_inputs, ("model",))
    sd_inputs = {FIT_MODEL: out / "srt/model", "data.init_args.disjoint_from": out / "collect/questions.json"}
    self_distill = Stage("self_distill", "fit", recipe / "self_distill.yaml", sd_inputs, ("model",))

    def evaluation(name: str, model: dict[str, Path]) -> Stage:
        return Stage(f"{name}/eval", "test", recipe / "eval.yaml", _keys(model, FIT_MODEL), ("results.json",))

    return [
        *trained,
        evaluation("base", base_model),
        collect,
        srt,
        evaluation("srt", {"model": out / "srt/model"}),
        self_distill,
        evaluation("self_distill", {"model": out / "self_distill/model"}),
    ]


FIT_MODEL = "model.init_args.model.path"


def _keys(model: dict[str, Path], key: str) -> dict[str, Path]:
    return {key: model["model"]} if model else {}


def resolved(path: Path) -> dict[str, Any]:
    """A config as flat `a.b.c: value` pairs, with the YAML files it names put in their place."""

    def walk(prefix: str, value: Any, folder: Path) -> dict[str, Any]:
        if isinstance(value, str) and value.endswith(".yaml") and (folder / value).is_file():
            return walk(prefix, yaml.safe_load((folder / value).read_text()), (folder / value).parent)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        flat = [walk(f"{prefix}.{key}" if prefix else str(key), item, folder) for key, item in items]
        return {k: v for part in flat for k, v in part.items()} if flat else {prefix: value}

    return walk("", yaml.safe_load(path.read_text()), path.parent)


def content_sha256(path: Path) -> str:
    """Hash of an input: of the weights of a model folder, of the bytes of a file."""
    return folder_sha256(path) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


class Run:
    """The run's folder with its lineage.json: per finished stage its config, versions and hashes."""

    def __init__(self, recipe: Path, out: Path, seed: int, engine: str | None) -> None:
        self.recipe, self.out, self.seed, self.engine = recipe, out, seed, engine
        self.lineage_path = out / "lineage.json"
        self.lineage: dict[str, Any] = {}
        if self.lineage_path.is_file():
            self.lineage = json.loads(self.lineage_path.read_text())

    def execute(self) -> None:
        plan = stages(self.recipe, self.out)
        for number, stage in enumerate(plan, 1):
            title = f"[{number}/{len(plan)}] {stage.name}"
            if self._finished(stage):
                print(f"{title}: finished before", flush=True)
                continue
            print(f"{title}: {stage.command} {stage.config}", flush=True)
            self._execute(stage)
        summary = summarize(self.out, self.lineage)
        write_text(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_table(summary)
        print(f"\ncurves: tensorboard --logdir {self.out}\nfigures: {self.out / 'summary.json'}")

    def _identity(self, stage: Stage) -> dict[str, Any]:
        config = {**resolved(stage.config), "seed_everything": self.seed}
        if self.engine is not None:
            config["engine"] = self.engine
        return {"config": config, "inputs": {key: content_sha256(path) for key, path in stage.inputs.items()}}

    def _finished(self, stage: Stage) -> bool:
        """Raises: ValueError naming the changed key where the stage started or finished with another config."""
        record = self.lineage.get(stage.name)
        if record is None:
            return False
        now = self._identity(stage)
        for what in ("config", "inputs"):
            before, after = record[what], json.loads(json.dumps(now[what]))
            changed = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
            if changed:
                raise ValueError(
                    f"stage {stage.name} of {self.out} ran with other {what}: {', '.join(changed)} changed. "
                    f"Take another --out, or remove {self.out / stage.name} and its entry in lineage.json"
                )
        return "seconds" in record and all((self.out / stage.name / o).exists() for o in stage.outputs)

    def _execute(self, stage: Stage) -> None:
        folder = self.out / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        spent = self.lineage.get(stage.name, {}).get("spent", 0.0)
        # written before the stage starts, so that a restart with another config is noticed too
        self._record(stage, {**self._identity(stage), "spent": spent})
        command = self._command(stage, folder)
        started = time.monotonic()
        code = subprocess.run(command, env={**os.environ, "SDZERO_PARENT": str(os.getpid())}, check=False).returncode
        spent += time.monotonic() - started
        self._record(stage, {**self.lineage[stage.name], "spent": spent})
        if code:
            sys.exit(f"sdzero run: stage {stage.name} ended with exit code {code}; its command:\n{shlex.join(command)}")
        outputs = {o: content_sha256(folder / o) for o in stage.outputs}
        versions = {"sdzero": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
        self._record(stage, {**self.lineage[stage.name], "outputs": outputs, "versions": versions, "seconds": spent})

    def _record(self, stage: Stage, record: dict[str, Any]) -> None:
        self.lineage[stage.name] = record
        write_text(self.lineage_path, json.dumps(self.lineage, indent=2) + "\n")

    def _command(self, stage: Stage, folder: Path) -> list[str]:
        options = {"seed_everything": str(self.seed), **{key: str(path) for key, path in stage.inputs.items()}}
        options |= {"out": str(folder)} if stage.command == "collect" else {"trainer.default_root_dir": str(folder)}
        if self.engine is not None:
            key = "engine" if stage.command == "collect" else "data.init_args.engine"
            if any(k.startswith(f"{key}.") or k == key for k in resolved(stage.config)):
                options[key] = ENGINES[self.engine]
        checkpoint = newest_checkpoint(folder / "checkpoints") if stage.command == "fit" else None
        if checkpoint is not None:
            print(f"going on from {checkpoint}", flush=True)
            options["ckpt_path"] = str(checkpoint)
        arguments = [f"--{key}={value}" for key, value in options.items()]
        return [sys.executable, "-m", "sdzero", stage.command, "--config", str(stage.config), *arguments]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="sdzero run", description="Runs a recipe's stages in order; call it again to go on."
    )
    parser.add_argument("recipe", type=Path, help="folder with collect.yaml, srt.yaml, self_distill.yaml, eval.yaml")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--seed", type=int, default=0, help="the run's seed (default: 0)")
    parser.add_argument("--engine", choices=sorted(ENGINES), help="another rollout engine than the recipe's")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs") / options.recipe.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"sdzero run: another run is at work in {out}")
        Run(options.recipe, out, options.seed, options.engine).execute()
