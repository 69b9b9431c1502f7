"""Faults of one rank: all ranks end or all continue, and none waits for a dead one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sdzero.types import Example
from support.ranks.faults import fit
from support.runs import ROOT, environment, scalars

TESTS = str(ROOT / "tests")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run fault_ranks.py; its output is in `output`."""
    out = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "tests/support/ranks/fault_ranks.py", str(out)]
    options: dict[str, Any] = {"cwd": ROOT, "env": environment(PYTHONPATH=TESTS), "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    (out / "output").write_text(done.stdout)
    return out


def test_a_signal_to_one_rank_ends_all_and_an_engine_that_dies_on_one_is_restarted(out: Path) -> None:
    """The disturbed run ends bitwise as the undisturbed one."""
    assert (out / "output").read_text().splitlines()[:3] == ["undisturbed 0 0", "preempted 143 0", "preempted 0 0"]
    assert "ended by SIGTERM" in (out / "preempted0.log").read_text()
    assert "the engine fell over: restart 1 of at most 2" in (out / "preempted1.log").read_text()
    assert "the engine of another rank died: restart 1 of at most 2" in (out / "preempted0.log").read_text()
    assert scalars(out / "preempted", "rollout/engine_restarts") == [[(0, 0), (1, 0)], [(2, 0), (3, 1)]]
    ours, theirs = ((out / name / "model/model.safetensors").read_bytes() for name in ("preempted", "undisturbed"))
    assert ours == theirs
    assert [
        sorted(out.glob(f"{name}/checkpoints/preempted-step=2.ckpt")) != [] for name in ("undisturbed", "preempted")
    ] == [0, 1]


def test_nan_on_one_rank_stops_all_and_each_leaves_its_batch(out: Path) -> None:
    assert (out / "output").read_text().splitlines()[3] == "nan 1 1"
    kept = [torch.load(out / f"nan/nonfinite/step=1-rank={rank}.pt") for rank in (0, 1)]
    ids = [[Example(**row).id for row in file["examples"]] for file in kept]
    assert [len(part) for part in ids] == [2, 1] and kept[0]["denominators"] == kept[1]["denominators"]
    for rank in (0, 1):
        assert f"batch {ids[rank]}. max_nonfinite_steps=0" in (out / f"nan{rank}.log").read_text()


class Running:
    """`sdzero fit` on two ranks that its launcher has started, at the fault of one of them."""

    def __init__(self, out: Path, fault: str, rank: int) -> None:
        mark, self.log = out.with_suffix(".mark"), out.with_suffix(".log")
        arguments = fit(out, fault=fault, rank=rank, call=0, mark=mark)
        # the console script, where ranks are started from a file and not by -m
        command = [sys.executable, str(Path(sys.executable).with_name("sdzero")), *arguments]
        with self.log.open("w") as output:
            options: dict[str, Any] = {"cwd": ROOT, "env": environment(PYTHONPATH=TESTS), "stdout": output}
            self.process = subprocess.Popen(command, stderr=output, start_new_session=True, **options)
        deadline = time.monotonic() + 120
        while not mark.exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        self.came_at, self.faulty = time.monotonic(), int(mark.read_text())

    def end(self, seconds: float) -> int:
        """Return the status of rank 0 after the end of all ranks."""
        code = self.process.wait(seconds)
        while time.monotonic() < self.came_at + seconds:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return code
            time.sleep(0.05)
        pytest.fail(f"a rank is left:\n{self.log.read_text()}")

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.wait()


@pytest.mark.parametrize("fault", ["kill", "raise"])
def test_rank_0_ends_with_another_rank(tmp_path: Path, fault: str) -> None:
    with Running(tmp_path / "out", fault, rank=1) as run:
        assert run.end(30) != 0


def test_other_ranks_end_with_rank_0(tmp_path: Path) -> None:
    """It is killed while rank 1 hangs in a call."""
    with Running(tmp_path / "out", "wait", rank=1) as run:
        run.process.kill()
        run.came_at = time.monotonic()
        assert run.end(10) == -signal.SIGKILL
