"""`sdzero run RECIPE_DIR`: the stages of a recipe in order, each model evaluated.

Each stage is a child process. A finished stage is skipped if its config and its inputs are the ones that lineage.json
records; an interrupted training resumes from the newest checkpoint that verifies.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NoReturn

from sdzero import __version__
from sdzero.engines import ENGINES
from sdzero.pipeline.stages import OUTPUTS, RUNS, Check, Options, Stage, list_stages, parse
from sdzero.pipeline.summary import print_table, summarize
from sdzero.utils.files import add_path_to_errors, file_sha256, write_text
from sdzero.utils.lineage import LINEAGE, Lineage, Outline, read_lineage
from sdzero.utils.process import PARENT, STACKS, STAGE, exit_status, handle_signals, requeue, signal_name, write_stderr
from sdzero.utils.recipe import Recipe, load_recipe

PLACES = {"devices", "num_nodes", "trainer.devices", "trainer.num_nodes"}
"""Keys that say where a stage runs, not what it does: an interrupted one may go on on other machines."""
STAGE_FILE = "stage.yaml"
"""The whole config of a stage, in its folder: `sdzero COMMAND --config` with it repeats the stage."""
PACKAGES = ("torch", "lightning", "transformers")
CRASHES = [-signum for signum in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)]
"""Exit codes of a process that its own native code has ended."""

MAX_RESTARTS = 3
"""Maximum number of restarts of a stage that hangs or crashes in native code."""

LOCK_SECONDS = 3.0
"""A stage whose `sdzero run` was killed takes a moment to notice, and holds the folder's lock until it has ended."""


def content_sha256(path: Path) -> str:
    """Hash an input: the weights of a model folder or the bytes of a file. A hub id stands for itself."""
    if path.is_dir():
        from sdzero.models.weights import folder_sha256  # brings torch, which --help does without

        return folder_sha256(path)
    return file_sha256(path) if path.is_file() else str(path)


class Run:
    """A run in its folder, with its lineage.json.

    Args:
        recipe: the recipe.
        stages: its stages.
        out: the run's folder.
        lock: open file whose lock this process holds; the stages' processes inherit it.
        launcher: command that starts a stage's processes in place of this interpreter.
    """

    def __init__(
        self, recipe: Recipe, stages: Sequence[Stage], out: Path, lock: IO[str], launcher: Sequence[str] = ()
    ) -> None:
        self.stages, self.out, self.lock, self.launcher = stages, out, lock, launcher
        self.process: subprocess.Popen[bytes] | None = None  # of the running stage
        self.is_starting = False
        self.signum = 0  # the first signal to end the run
        records = read_lineage(out).stages if (out / LINEAGE).is_file() else {}
        self.lineage = Lineage(Outline(recipe.name, recipe.entries), records)

    def execute(self, check: Check) -> None:
        if not self.lineage.stages:  # a wrong key in the last stage must not show after the first has run for hours
            for stage in self.stages:
                _check_engine(stage)
            parse(self.stages, check)
        for number, stage in enumerate(self.stages, 1):
            title = f"[{number}/{len(self.stages)}] {stage.name}"
            if self._finished(stage):
                print(f"{title}: finished before", flush=True)
                continue
            print(f"{title}: {stage.command} {' + '.join(map(str, stage.sources))}", flush=True)
            self._execute(stage)
            if self.signum:  # it came as the stage ended
                self._stop()
        summary = summarize(self.out, self.lineage)
        write_text(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_table(summary)
        print(f"\ncurves: tensorboard --logdir {self.out}\nmetrics: {self.out / 'summary.json'}")
        print(f"report: sdzero report {self.out}")

    def _identity(self, stage: Stage) -> dict[str, Any]:
        config = stage.identity()
        named = {key: file for key, value in config.items() if (file := _local_file(value)) is not None}
        return {
            "config": config,
            "inputs": {key: content_sha256(path) for key, path in {**named, **stage.inputs}.items()},
        }

    def _finished(self, stage: Stage) -> bool:
        """Return True if the stage has finished; raise ValueError if it ran with another config or other inputs."""
        record = self.lineage.stages.get(stage.name)
        if record is None or not stage.folder.is_dir():
            return False
        now = self._identity(stage)
        for what in ("config", "inputs"):
            before, after = record[what], json.loads(json.dumps(now[what]))
            changed = sorted(k for k in {*before, *after} - PLACES if before.get(k) != after.get(k))
            if changed:
                raise ValueError(
                    f"stage {stage.name} of {self.out} ran with other {what}: {', '.join(changed)} changed. "
                    f"Choose another --out, or remove {stage.folder} to run the stage again"
                )
        return "seconds" in record and all((stage.folder / o).exists() for o in OUTPUTS[stage.command])

    def _execute(self, stage: Stage) -> None:
        stacks = stage.folder / STACKS
        # written before the stage starts, so that a restart with another config is noticed too
        record = {**self._identity(stage), "spent": self.lineage.stages.get(stage.name, {}).get("spent", 0.0)}
        self._check_inputs(stage, record["inputs"])
        self._record(stage, record)
        stage.folder.mkdir(parents=True, exist_ok=True)
        sources = " + ".join(map(str, stage.sources))
        write_text(stage.folder / STAGE_FILE, f"# Merged by `sdzero run` from {sources}\n{stage.to_yaml()}")
        started = time.monotonic()
        command, code = self._attempt(stage)
        for restart in range(1, MAX_RESTARTS + 1):
            if not code or self.signum or not _faulted(code, stacks):
                break
            print(
                f"stage {stage.name} hung or crashed in native code (exit code {code}; its stacks: {stacks}): "
                f"restart {restart} of at most {MAX_RESTARTS}",
                flush=True,
            )
            command, code = self._attempt(stage)
        record["spent"] += time.monotonic() - started
        self._record(stage, record)
        if self.signum and code:
            self._stop()
        if code:
            hint = f"\nits stacks: {stacks}" if _faulted(code, stacks) else ""
            command_line = shlex.join(command)
            sys.exit(f"sdzero run: stage {stage.name} ended with exit code {code}; its command:\n{command_line}{hint}")
        outputs = {o: content_sha256(stage.folder / o) for o in OUTPUTS[stage.command]}
        versions = {"sdzero": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
        self._record(stage, {**record, "outputs": outputs, "versions": versions, "seconds": record["spent"]})

    def _check_inputs(self, stage: Stage, hashes: Mapping[str, str]) -> None:
        """Raise ValueError if a file differs from what an earlier stage wrote: cut, damaged or edited."""
        for name, record in self.lineage.stages.items():
            for output, written in record.get("outputs", {}).items():
                path = self.out / name / output
                if any(path == stage.inputs.get(key) and written != now for key, now in hashes.items()):
                    raise ValueError(
                        f"stage {stage.name} would read {path}, which is not what stage {name} wrote: restore a "
                        f"copy, or remove {self.out / name} to run that stage again"
                    )

    def _attempt(self, stage: Stage) -> tuple[list[str], int]:
        """Start or resume the stage's process; return its command and exit code."""
        folder, stacks = stage.folder, stage.folder / STACKS
        resume = ["--ckpt_path=newest"] if stage.command == "fit" else []
        program = [*(self.launcher or [sys.executable]), "-m", "sdzero"]
        command = [*program, stage.command, "--config", str(folder / STAGE_FILE), *resume]
        environment = {**os.environ, STAGE: str(folder.resolve())}
        if not self.launcher:  # a launcher is the parent of its processes, maybe on another machine, and ends them
            environment[PARENT] = str(os.getpid())
        stacks.unlink(missing_ok=True)
        self.is_starting = True
        # the child holds the lock too: where this process is killed, no other run starts before the child has ended
        self.process = subprocess.Popen(command, env=environment, pass_fds=[self.lock.fileno()])
        self.is_starting = False
        if self.signum:  # it came meanwhile
            self.process.send_signal(self.signum)
        code, self.process = self.process.wait(), None
        if stacks.exists() and not stacks.stat().st_size:
            stacks.unlink()  # no process had anything to write
        return command, code

    def handle(self, signum: int, _: Any) -> None:
        """Forward a signal to the stage, which handles it; the run ends after the stage."""
        self.signum = self.signum or signum
        if self.process is not None:
            self.process.send_signal(signum)
        elif not self.is_starting:
            self._stop()

    def _stop(self) -> NoReturn:
        write_stderr(f"sdzero run: ended by {signal_name(self.signum)}. Resume with the same command")
        requeue(self.signum)
        sys.exit(exit_status(self.signum))

    def _record(self, stage: Stage, record: dict[str, Any]) -> None:
        self.lineage.stages[stage.name] = record
        write_text(self.out / LINEAGE, self.lineage.to_json())


def _local_file(value: Any) -> Path | None:
    """Return the user's own file that a config's value names: by its path, or as the module of a class_path."""
    if not isinstance(value, str):
        return None
    module = value.rpartition(".")[0].replace(".", "/") + ".py"
    return next((Path(name) for name in (value, module) if os.path.isfile(name)), None)  # a prompt is not a path either


def _check_engine(stage: Stage) -> None:
    if stage.engine == ENGINES["vllm"] and find_spec("vllm") is None:
        raise ValueError(
            f'{stage.sources[-1]}: {stage.engine_key}: vLLM is not installed: pip install "sdzero[cuda]" (or '
            '"sdzero[cpu]"), or choose --engine transformers'
        )


def _faulted(code: int, stacks: Path) -> bool:
    """Return True if native code hung or crashed in a process of the stage. Stacks are written only then; another
    process of the stage may have been killed for it."""
    return code in CRASHES or stacks.exists()


def _acquire(lock: IO[str], out: Path) -> None:
    """Lock the folder; raise ValueError if another run holds it."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(f"another run is at work in {out}: wait for its end, or take another --out") from None
        time.sleep(0.1)


def main(arguments: list[str], check: Check) -> None:
    options = _parser().parse_args(arguments)
    if options.phase2_only:
        raise ValueError("--phase2-only is an overlay now: --overlay configs/ablations/table12_phase2_only")
    recipe = load_recipe(options.recipe, options.overlay)
    out = options.out or RUNS / _run_name(recipe, options.overlay)
    overrides = Options(options.seed, options.engine, options.devices, options.num_nodes)
    stages = list_stages(recipe, out, overrides)  # a folder that is not a recipe leaves nothing behind
    if options.dry_run:
        from sdzero.pipeline.dry_run import dry_run  # imports torch

        return dry_run(recipe, parse(stages, check))
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        _acquire(lock, out)
        run = Run(recipe, stages, out, lock, shlex.split(options.launch))
        with add_path_to_errors(out), handle_signals(run.handle, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            run.execute(check)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdzero run", description="Runs a recipe's stages in order; call it again to go on."
    )
    parser.add_argument("recipe", type=Path, help="folder with a recipe.yaml; `sdzero init` lists the shipped ones")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/RECIPE, runs/RECIPE+OVERLAY)")
    parser.add_argument("--seed", type=int, help="the run's seed (default: the recipe's seed_everything)")
    parser.add_argument("--engine", choices=sorted(ENGINES), help="another rollout engine than the recipe's")
    parser.add_argument("--devices", type=int, metavar="N", help="processes per node, one a GPU, of every stage")
    parser.add_argument("--num-nodes", type=int, metavar="N", help="nodes of every stage; each needs a launcher")
    parser.add_argument(
        "--launch",
        default="",
        metavar="PREFIX",
        help="what starts a stage's processes in the place of this interpreter, as "
        "'torchrun --standalone --nproc-per-node 8' or 'srun python'",
    )
    parser.add_argument(
        "--overlay",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder with any of the recipe's files, merged over these key by key; may be given several times",
    )
    parser.add_argument("--phase2-only", action="store_true", help=argparse.SUPPRESS)  # says what took its place
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print each stage's generations, tokens and memory per GPU, refuse what cannot fit, and run nothing",
    )
    return parser


def _run_name(recipe: Recipe, overlays: Sequence[Path]) -> str:
    return "+".join([recipe.name, *(folder.resolve().name for folder in overlays)])
