"""Kills at chosen moments of `sdzero run`: what tests of restarts, and `make chaos`, share."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Literal

import pytest

from runs import ROOT, SMOKE, command, environment

STOPS = ROOT / "tests/stops"
SECONDS = 120.0


@dataclass
class Killed:
    """A run that stood still and was killed there.

    Attributes:
        said: what it and its stage printed.
        code: its exit status.
        files: of the run, as they were then.
    """

    said: str
    code: int
    files: list[str]


def wait_for(path: Path, process: subprocess.Popen[str], log: Path) -> int:
    """The id that a process standing still has written."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, f"ended before it came there:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    return int(path.read_text())


def kill_at(
    out: Path, stop: str, victim: Literal["group", "stage", "run"], meanwhile: Callable[[], None] = lambda: None
) -> Killed:
    """Runs the smoke recipe until `stop` and kills the whole process group, the stage or the run's own process."""
    mark, log = out.with_name("stopped"), out.with_name("killed.log")
    mark.unlink(missing_ok=True)
    variables = environment(SDZERO_TEST_STOP=stop, SDZERO_TEST_STOPPED=str(mark))
    variables["PYTHONPATH"] = os.pathsep.join([str(STOPS), *filter(None, [variables.get("PYTHONPATH")])])
    with log.open("w") as output:
        process = subprocess.Popen(
            command("run", SMOKE, "--out", out),
            **{"cwd": ROOT, "env": variables, "stdout": output, "stderr": output, "text": True},
            start_new_session=True,
        )
        try:
            stage = wait_for(mark, process, log)
            assert stage != process.pid
            meanwhile()
            if victim == "group":
                os.killpg(process.pid, signal.SIGKILL)
            elif victim == "stage":
                os.kill(stage, signal.SIGKILL)
            else:
                kill_above(stage, process, out)
            code = process.wait(SECONDS)
            wait_for_lock(out)
        finally:
            with suppress(ProcessLookupError):  # a failed test leaves nobody standing
                os.killpg(process.pid, signal.SIGKILL)
    return Killed(log.read_text(), code, sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()))


def kill_above(stage: int, process: subprocess.Popen[str], out: Path) -> None:
    """Kills the run's process. Its orphan keeps the folder from other runs as long as it lives."""
    os.kill(stage, signal.SIGSTOP)  # so that it cannot end before we have looked
    process.kill()
    process.wait(SECONDS)
    with (out / ".lock").open("w") as lock, pytest.raises(BlockingIOError):
        flock(lock, LOCK_EX | LOCK_NB)
    os.kill(stage, signal.SIGCONT)


def wait_for_lock(out: Path) -> None:
    """Until the folder is free: a stage holds it like its run, so an orphan has ended then."""
    deadline = time.monotonic() + 10
    with (out / ".lock").open("w") as lock:
        while True:
            try:
                return flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "the orphan of a killed run is still at work"
                time.sleep(0.02)
