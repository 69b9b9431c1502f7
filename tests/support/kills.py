"""Kills at chosen points of `sdzero run`, for tests of restarts and `make chaos`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Literal

import pytest

from support.runs import ROOT, SMOKE, command, environment

STOPS = ROOT / "tests/support/stops"
SECONDS = 120.0

Victim = Literal["group", "stage", "run"]


@dataclass
class Killed:
    """A run that was halted and killed there."""

    said: str  # output of the run and its stage
    code: int  # exit status
    files: list[str]  # of the run at that moment


@dataclass
class Started:
    """A running `sdzero run` of the smoke recipe."""

    process: subprocess.Popen[str]
    out: Path
    mark: Path  # a halted process writes its id there
    log: Path

    def wait_for_stop(self) -> int | None:
        """Return the id of the halted process; None if the run ended first."""
        deadline = time.monotonic() + SECONDS
        while not self.mark.exists():
            if self.process.poll() is not None:
                return None
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return int(self.mark.read_text())

    def kill(self, victim: Victim, stage: int | None) -> Killed:
        """Kill the whole process group, the stage or the run's own process; return when the folder is free."""
        if victim == "group" or stage is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        elif victim == "stage":
            os.kill(stage, signal.SIGKILL)
        else:  # its orphan keeps the folder from other runs as long as it lives
            os.kill(stage, signal.SIGSTOP)  # so that it cannot end before the check
            self.process.kill()
            self.process.wait(SECONDS)
            with (self.out / ".lock").open("w") as lock, pytest.raises(BlockingIOError):
                flock(lock, LOCK_EX | LOCK_NB)
            os.kill(stage, signal.SIGCONT)
        code = self.process.wait(SECONDS)
        wait_for_lock(self.out)
        files = sorted(str(f.relative_to(self.out)) for f in self.out.rglob("*") if f.is_file())
        return Killed(self.log.read_text(), code, files)


@contextmanager
def started(out: Path, stop: str = "") -> Iterator[Started]:
    """Run the smoke recipe until it halts at `stop` (see support/stops); kill what is left at the end."""
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
            yield Started(process, out, mark, log)
        finally:
            with suppress(ProcessLookupError):  # after a failed test
                os.killpg(process.pid, signal.SIGKILL)


def kill_at(out: Path, stop: str, victim: Victim, meanwhile: Callable[[], None] = lambda: None) -> Killed:
    """Run the smoke recipe until a stage halts at `stop`, and kill `victim`."""
    with started(out, stop) as run:
        stage = run.wait_for_stop()
        assert stage is not None, f"ended before {stop}:\n{run.log.read_text()}"
        assert stage != run.process.pid
        meanwhile()
        return run.kill(victim, stage)


def wait_for_lock(out: Path) -> None:
    """Wait until the folder is free: a stage holds its lock too, so an orphan has ended then."""
    deadline = time.monotonic() + 10
    with (out / ".lock").open("w") as lock:
        while True:
            try:
                return flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "the orphan of a killed run is still running"
                time.sleep(0.02)
