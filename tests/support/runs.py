"""Helpers for tests of whole runs: the command line in its own process and in this one, and a run's files."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdzero.cli.main import main
from sdzero.utils.row_checksum import verify_checksum

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs/recipes/smoke"
STAGES = ("base", "base/eval", "collect", "srt", "srt/eval", "self_distill", "self_distill/eval")
MODELS = ("base", "srt", "self_distill")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "sdzero", *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """Return variables of a child process. One thread: bitwise the same on a busy machine and on an idle one."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def sdzero(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process, from the repository's root, where recipes expect to be."""
    options: dict[str, Any] = {"cwd": ROOT, "env": environment(**variables), "capture_output": True, "text": True}
    return subprocess.run(command(*arguments), **options, check=False)


def run_script(name: str, *arguments: Path) -> None:
    """Run a script of tests/support/ranks."""
    tests = ROOT / "tests"
    line = [sys.executable, str(tests / "support/ranks" / name), *map(str, arguments)]
    variables = environment(PYTHONPATH=os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, check=False, env=variables)
    assert done.returncode == 0, done.stderr[-4000:]


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """Return the error line of a command that this process runs: a status above 0, and no traceback."""
    capsys.readouterr()
    code = exit_code(monkeypatch, *arguments)
    output = capsys.readouterr().err if isinstance(code, int) else str(code)
    line = next(line for line in output.splitlines() if "error:" in line)
    assert code and line.startswith("sdzero ") and "Traceback" not in output, output
    return line


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, cwd: Path = ROOT) -> Any:
    """Run a command in this process. Return 0, or the argument of its sys.exit."""
    monkeypatch.setattr(sys, "argv", ["sdzero", *map(str, arguments)])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # commands set it: the test's end must put it back
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts its folder there
    try:
        main()
    except SystemExit as exit:
        return exit.code
    return 0


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Call `make` on a folder, once for all workers of a test run. Read or copy the folder; never write there."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / f"{name}.made").exists():
            make(shared / name)
            (shared / f"{name}.made").touch()
    return shared / name


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file; verify and remove the rows' checksums."""
    return [verify_checksum(json.loads(line)) for line in path.read_text().splitlines()]


def num_calls(out: Path) -> int:
    """Count the generate calls started in a run, interrupted ones included."""
    return sum(len(file.read_text().splitlines()) for file in out.rglob("calls*.log"))


def responses(journal: Path, kind: str) -> list[dict[str, Any]]:
    """Return all responses of the groups that begin with `kind`, in order."""
    return [r for file in sorted(journal.glob(f"{kind}*.jsonl")) for row in rows(file) for r in row["responses"]]


def scalars(folder: Path, name: str) -> list[list[tuple[int, float]]]:
    """Return (step, value) of a curve, for every event file of a stage: one for each time it was started."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: list[list[tuple[int, float]]] = []
    for file in sorted(folder.glob("events*"), key=lambda f: f.stat().st_mtime_ns):
        events = EventAccumulator(str(file)).Reload()
        points = events.Scalars(name) if name in events.Tags()["scalars"] else []
        curves.append([(point.step, point.value) for point in points])
    return curves


def records(out: Path) -> dict[str, Any]:
    """Return the record of each stage in a run's lineage.json."""
    return read_json(out / "lineage.json")["stages"]


def write_records(out: Path, kept: dict[str, Any]) -> None:
    """Replace the records in a run's lineage.json."""
    lineage = read_json(out / "lineage.json")
    (out / "lineage.json").write_text(json.dumps({**lineage, "stages": kept}))
