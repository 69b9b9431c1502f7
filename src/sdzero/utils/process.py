"""Early ends of a command's process: by a signal, with its parent, or by a watchdog."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

PARENT = "SDZERO_PARENT"
"""Environment variable: id of the process with which this one must exit."""

STAGE = "SDZERO_STAGE"
"""Environment variable: folder of the stage of `sdzero run` to which this process belongs."""

STACKS = "stacks.txt"
"""File in the stage's folder; not empty only if a process of the stage hung or crashed in native code."""

_STDERR = 2  # the descriptor: sys.stderr may be replaced, in a notebook or a test, by an object without one


class Stopped(SystemExit):
    """Orderly exit after a signal. `code` is the exit status."""


def exit_status(signum: int) -> int:
    """Return the exit status that shells report for a process ended by a signal."""
    return 128 + signum


def signal_name(signum: int) -> str:
    return signal.Signals(signum).name


def is_first_process() -> bool:
    """Return whether this is rank 0 or the only process, by the variables that launchers set."""
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def write_stderr(line: str) -> None:
    """Print to stderr from a signal handler, which may have interrupted a print."""
    os.write(_STDERR, f"{line}\n".encode())


def exit_now(status: int) -> NoReturn:
    """Exit without the interpreter's shutdown, in which an engine of this process may hang or crash."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(RuntimeError):  # a handler may have interrupted a print
            stream.flush()
    os._exit(status)


@contextmanager
def handle_signals(handler: Any, *signums: int) -> Iterator[None]:
    """Install a signal handler (a function, or signal.SIG_IGN) for the block; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextmanager
def exit_on_signals(command: str) -> Iterator[None]:
    """Exit at once, with one line, on Ctrl-C, SIGTERM and SIGUSR1: for commands that lose nothing when killed."""

    def end(signum: int, _: Any) -> None:
        if is_first_process():
            resume = "resume with --ckpt_path=newest" if command == "fit" else "the same command resumes from there"
            line = f"sdzero {command}: ended by {signal_name(signum)}. Finished generate calls are kept: {resume}"
            write_stderr(line)
            requeue(signum)
        exit_now(exit_status(signum))

    with handle_signals(end, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        yield


def requeue(signum: int) -> None:
    """Requeue the SLURM job if SIGUSR1 announced its end. A stage leaves that to its `sdzero run`."""
    job = os.environ.get("SLURM_JOB_ID")
    if signum != signal.SIGUSR1 or job is None or STAGE in os.environ:
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if shutil.which("scontrol") is None:
        return write_stderr(f"SLURM job {job} is not requeued: scontrol is not installed here")
    code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    failure = f"SLURM job {job} is not requeued: scontrol ended with {code}"
    write_stderr(failure if code else f"SLURM job {job} is requeued")


def exit_with_parent() -> None:
    """Watch the process that PARENT names, and exit soon after it: a stage or rank must not outlive it.

    It would run alongside the next run of the same folder, or wait in a collective for a rank that has exited.
    """
    parent = int(os.environ.pop(PARENT, 0))
    if not parent or (os.getppid() != parent and _is_alive(parent)):
        return  # PARENT is a more distant ancestor: the process in between watches it

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="exit-with-parent").start()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def export_parent_id() -> Iterator[None]:
    """Set PARENT for a command that may launch the other ranks of its node: they exit with this process."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """End the process with status 1 if the block takes longer than `seconds`, after writing all threads' stacks.

    For calls that may hang in native code, where no exception reaches them. Only one at a time in a process.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=stacks_file())
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def enable_crash_stacks() -> None:
    """Write the stacks of a stage of `sdzero run` if native code crashes it."""
    if STAGE in os.environ:
        faulthandler.enable(stacks_file())


def stacks_file() -> int:
    """Return the descriptor for stacks: the stage's file, where `sdzero run` looks for it; otherwise stderr."""
    stage = os.environ.get(STAGE)
    if stage is None:
        return _STDERR
    global _descriptor
    if _descriptor is None:
        _descriptor = os.open(Path(stage) / STACKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    return _descriptor


_descriptor: int | None = None
