"""A run that is killed at its worst moments ends as one that was not: the same weights and traces, to the bit."""

from __future__ import annotations

import json
import os
import shutil
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

from runs import ROOT, SMOKE, command, environment, num_calls, read_json, refusal, scalars, sdzero
from sdzero import pipeline

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


@pytest.fixture(scope="module")
def out(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has its base, and the evaluations that it will need where its models are the uninterrupted run's."""
    out = tmp_path_factory.mktemp("killed") / "run"
    shutil.copytree(smoke_run / "base", out / "base")
    for name in ("srt", "self_distill"):
        shutil.copytree(smoke_run / name / "eval", out / name / "eval")
    lineage = read_json(smoke_run / "lineage.json")
    kept = {name: record for name, record in lineage.items() if name == "base" or name.endswith("eval")}
    (out / "lineage.json").write_text(json.dumps(kept))
    return out


def test_killed_again_and_again(
    smoke_run: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = num_calls(out)
    monkeypatch.setattr(pipeline, "LOCK_SECONDS", 0.2)

    def second_run() -> None:
        assert "another run is at work" in refusal(capsys, monkeypatch, "run", SMOKE, "--out", out)

    # in collect, after the second of its eight calls, everything at once
    killed = kill_at(out, "fsync=2", "group", second_run)
    assert killed.code == -signal.SIGKILL
    assert "collect/journal/00000-revision.jsonl" in killed.files and "collect/traces.jsonl" not in killed.files

    # in SRT, once step 2 is in a checkpoint, the stage alone: the run says which stage died, and ends
    killed = kill_at(out, "replace=step=2.ckpt.sha256.json", "stage")
    assert killed.code == 1 and "stage srt ended with exit code -9" in killed.said
    assert (out / "collect/traces.jsonl").read_bytes() == (smoke_run / "collect/traces.jsonl").read_bytes()

    # in SD, once step 2 is in a checkpoint, the run alone: its orphan ends by itself
    killed = kill_at(out, "replace=step=2.ckpt.sha256.json", "run")
    assert killed.code == -signal.SIGKILL and "going on from" in killed.said and "step=2.ckpt" in killed.said
    assert "srt/model/sdzero.json" in killed.files and "self_distill/model/sdzero.json" not in killed.files

    # in SD, after its last checkpoint and before its export: there is nothing left to train
    killed = kill_at(out, "replace=step=5.ckpt.sha256.json", "group")
    assert "going on from" in killed.said and "self_distill/model/sdzero.json" not in killed.files

    done = sdzero("run", SMOKE, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("going on from") == 1 and "step=5.ckpt" in done.stdout

    whole, resumed = read_json(smoke_run / "summary.json"), read_json(out / "summary.json")
    assert [row["weights_sha256"] for row in resumed] == [row["weights_sha256"] for row in whole]
    assert [{**row, "seconds": 0} for row in resumed] == [{**row, "seconds": 0} for row in whole]
    assert (out / "collect/traces.jsonl").read_bytes() == (smoke_run / "collect/traces.jsonl").read_bytes()
    assert before <= num_calls(out) <= num_calls(smoke_run) + 4

    for name, first_steps in (("srt", [0, 2]), ("self_distill", [0, 2])):
        curves = [curve for curve in scalars(out / name, "train/loss") if curve]
        assert [curve[0][0] for curve in curves] == first_steps, "a restart goes on from its checkpoint"
        whole = dict(scalars(smoke_run / name, "train/loss")[0])
        assert all(whole[step] == value for curve in curves for step, value in curve)
