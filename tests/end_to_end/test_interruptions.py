"""`sdzero run` that is preempted, and whose stage hangs in native code, ends bitwise as an undisturbed run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdzero.callbacks import Preemption, preemption
from sdzero.utils import process
from sdzero.utils.process import exit_on_signals
from support.runs import ROOT, SMOKE, command, environment, read_json, records, scalars, write_records

CALL = 2  # of the second phase's engine: the rollouts of step 3, before its first validation


@pytest.fixture
def out(smoke_run: Path, tmp_path: Path) -> Path:
    """Copy the smoke run without its second phase, whose evaluation is kept."""
    out = tmp_path / "run"
    for name in ("base", "collect", "srt", "self_distill/eval"):
        shutil.copytree(smoke_run / name, out / name)
    shutil.copy(smoke_run / "lineage.json", out)
    write_records(out, {name: record for name, record in records(out).items() if name != "self_distill"})
    return out


def started(out: Path, overlay: Path, fault: str, **variables: str) -> subprocess.Popen[str]:
    """Start the run with an engine that fails once."""
    mark = out.with_name(fault)
    overlay.mkdir(exist_ok=True)
    engine = {"class_path": "support.ranks.faults.Faulty", "init_args": {"fault": None, "call": CALL}}
    (overlay / "self_distill.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"engine": engine}}}))
    paths = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables |= {"SDZERO_TEST_FAULT": fault, "SDZERO_TEST_MARK": str(mark), "PYTHONPATH": paths}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment(**variables), "text": True, "start_new_session": True}
    with out.with_name(f"{fault}.log").open("w") as log:
        arguments = command("run", SMOKE, "--out", out, "--overlay", overlay)
        return subprocess.Popen(arguments, stdout=log, stderr=log, **options)


def wait_until(there: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def fake_scontrol(folder: Path) -> Path:
    """Write an `scontrol` into `folder`; return the file to which it appends a line per call."""
    folder.mkdir()
    calls, program = folder / "calls", folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(0o755)
    return calls


def test_preempted_during_rollouts_then_hung(smoke_run: Path, out: Path, tmp_path: Path) -> None:
    calls, log = fake_scontrol(tmp_path / "bin"), tmp_path / "wait.log"
    slurm = {"SLURM_JOB_ID": "77", "PATH": f"{calls.parent}:{os.environ['PATH']}"}
    with started(out, tmp_path / "overlay", "wait", **slurm) as run:
        try:
            wait_until((tmp_path / "wait").exists, run, log)
            run.send_signal(signal.SIGUSR1)
            wait_until(lambda: "the training ends at the next step boundary" in log.read_text(), run, log)
            (tmp_path / "wait.go").touch()
            assert run.wait(120) == 128 + signal.SIGUSR1, log.read_text()
        finally:
            run.kill()
    output = log.read_text()
    assert "preempted-step=3.ckpt" in output and "sdzero run: ended by SIGUSR1. Resume with the same command" in output
    assert "Traceback" not in output and calls.read_text() == "requeue 77\n", "the stage leaves it to the run"
    assert "SLURM job 77 is requeued" in output and not (out / "self_distill/model").exists()

    with started(out, tmp_path / "overlay", "hang") as run:
        code = run.wait(240)
    output = (tmp_path / "hang.log").read_text()
    assert code == 0, output
    stacks = out / "self_distill/stacks.txt"
    assert f"stage self_distill hung or crashed in native code (exit code 1; its stacks: {stacks}): restart 1" in output
    assert output.count(f"resuming from {out}/self_distill/checkpoints/preempted-step=3.ckpt") == 2, "it hung at step 4"
    assert not stacks.exists(), "it is of the last attempt"

    ours, theirs = ([{**row, "seconds": 0} for row in read_json(run / "summary.json")] for run in (out, smoke_run))
    assert ours == theirs
    for name in ("train/loss", "eval/avg_at_k"):
        expected = dict(scalars(smoke_run / "self_distill", name)[0])
        parts = [dict(curve) for curve in scalars(out / "self_distill", name)]
        assert {step: value for part in parts for step, value in part.items()} == expected


def in_a_fork(work: Callable[[], None], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `work` in a fork; return its status, 0 if it returned, and its stderr."""
    capfd.readouterr()
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), capfd.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_command_that_loses_nothing_ends_at_once_with_a_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, signum: int
) -> None:
    calls = fake_scontrol(tmp_path / "bin")
    for name, value in (("JOB_ID", "78"), ("ARRAY_JOB_ID", "77"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{calls.parent}:{os.environ['PATH']}")

    def collect() -> None:
        with exit_on_signals("collect"):
            os.kill(os.getpid(), signum)
            time.sleep(60)

    name = signal.Signals(signum).name
    line = f"sdzero collect: ended by {name}. Finished generate calls are kept: the same command resumes from there\n"
    code, output = in_a_fork(collect, capfd)
    assert code == 128 + signum and output.startswith(line)
    assert output[len(line) :] == ("SLURM job 77_3 is requeued\n" if signum == signal.SIGUSR1 else "")
    assert calls.exists() == (signum == signal.SIGUSR1) and (
        not calls.exists() or calls.read_text() == "requeue 77_3\n"
    )
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert in_a_fork(collect, capfd) == (code, ""), "only the first rank prints and requeues"


@pytest.mark.parametrize(("seconds", "status"), [(0.0, 0), (preemption.SECOND_SECONDS, 128 + signal.SIGUSR1)])
def test_a_second_signal_ends_a_fit_at_once(capfd: pytest.CaptureFixture[str], seconds: float, status: int) -> None:
    """The same one that comes twice, from a group's launcher and from its parent, is one."""

    def fit() -> None:
        callback = Preemption()
        callback.on_fit_start(None, None)  # pyright: ignore[reportArgumentType] - what it does not look at
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGUSR1)

    code, output = in_a_fork(fit, capfd)
    line = "SIGTERM: the training ends at the next step boundary; a second signal ends it at once\n"
    assert (code, output) == (status, line)


def is_running(process: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has ended, perhaps while it was read
        return False


def test_a_child_ends_with_its_parent(capfd: pytest.CaptureFixture[str]) -> None:
    def parent() -> None:
        os.environ[process.PARENT] = str(os.getpid())
        read, write = os.pipe()
        if child := os.fork():
            os.write(2, f"{child}".encode())
            os.read(read, 1)  # until it watches
            os._exit(0)
        process.exit_with_parent()
        os.write(write, b"x")
        time.sleep(60)

    code, child = in_a_fork(parent, capfd)
    deadline = time.monotonic() + 10
    while is_running(child):
        assert code == 0 and time.monotonic() < deadline
        time.sleep(0.05)


def test_only_a_child_ends_with_a_parent(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Where a process in between has started this one, it is for that one to end it."""

    def child() -> None:
        process.exit_with_parent()
        assert process.PARENT not in os.environ
        time.sleep(0.5)

    monkeypatch.setenv(process.PARENT, str(os.getppid()))
    assert in_a_fork(child, capfd) == (0, "")
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setenv(process.PARENT, str(gone.pid))
    assert in_a_fork(child, capfd) == (1, ""), "it was killed before its child could look"
