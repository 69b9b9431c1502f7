"""What tests of whole runs share: the command line in a process of its own and in this one, and a run's files."""

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
    """One thread: to the bit the same on a busy machine and on an idle one."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def sdzero(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, from the repository's root, where recipes expect to be."""
    options: dict[str, Any] = {"cwd": ROOT, "env": environment(**variables), "capture_output": True, "text": True}
    return subprocess.run(command(*arguments), **options, check=False)


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """What a command in this process refuses with: one line, a status above 0, and no traceback."""
    capsys.readouterr()
    code = exit_code(monkeypatch, *arguments)
    said = capsys.readouterr().err if isinstance(code, int) else str(code)
    line = next(line for line in said.splitlines() if "error:" in line)
    assert code and line.startswith("sdzero ") and "Traceback" not in said, said
    return line


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, cwd: Path = ROOT) -> Any:
    """Runs a command in this process. 0, or what it called sys.exit with."""
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
    """What `make` writes into a folder, once for all workers of a test run. Read it, or copy it; never write there."""
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
    """What a JSONL file says, without the rows' seals."""
    return [verify_checksum(json.loads(line)) for line in path.read_text().splitlines()]


def num_calls(out: Path) -> int:
    """Generate calls started in a run, the ones that were cut short too."""
    return sum(len(file.read_text().splitlines()) for file in out.rglob("calls*.log"))


def responses(journal: Path, kind: str) -> list[dict[str, Any]]:
    """All responses of the groups that begin with `kind`, in order."""
    return [r for file in sorted(journal.glob(f"{kind}*.jsonl")) for row in rows(file) for r in row["responses"]]


def scalars(folder: Path, name: str) -> list[list[tuple[int, float]]]:
    """(step, value) of a curve, for every event file of a stage: one for each time it was started."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: list[list[tuple[int, float]]] = []
    for file in sorted(folder.glob("events*"), key=lambda f: f.stat().st_mtime_ns):
        events = EventAccumulator(str(file)).Reload()
        points = events.Scalars(name) if name in events.Tags()["scalars"] else []
        curves.append([(point.step, point.value) for point in points])
    return curves


def records(out: Path) -> dict[str, Any]:
    """A run's lineage.json: its record of each stage."""
    return read_json(out / "lineage.json")["stages"]


def write_records(out: Path, kept: dict[str, Any]) -> None:
    """Puts other records into a run's lineage.json."""
    lineage = read_json(out / "lineage.json")
    (out / "lineage.json").write_text(json.dumps({**lineage, "stages": kept}))
