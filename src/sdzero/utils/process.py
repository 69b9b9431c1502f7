"""How a process of the command line ends before its time: by a signal, with its parent, or by its watchdog."""

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
"""Variable with the id of the process without which this one must not go on."""

STAGE = "SDZERO_STAGE"
"""Variable with the folder of the stage of `sdzero run` that this process belongs to."""

STACKS = "stacks.txt"
"""File in the stage's folder. It holds something only where a process of the stage hung or crashed in native code."""

_STDERR = 2  # the descriptor: sys.stderr may be a notebook's or a test's stand-in without one


class Stopped(SystemExit):
    """The process was told by a signal to end, and is ready to. `code` is its exit status."""


def exit_status(signum: int) -> int:
    """Exit status of a process that a signal has ended, as shells have it."""
    return 128 + signum


def signal_name(signum: int) -> str:
    return signal.Signals(signum).name


def is_first_process() -> bool:
    """Whether this is rank 0, or stands alone. Known from the start: launchers tell it by variables."""
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def write_stderr(line: str) -> None:
    """Prints to stderr from a signal handler, which may have interrupted a print."""
    os.write(_STDERR, f"{line}\n".encode())


def exit_now(status: int) -> NoReturn:
    """Ends without the interpreter's way out: an engine in this process may hang or crash on it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(RuntimeError):  # a handler may have interrupted a print
            stream.flush()
    os._exit(status)


@contextmanager
def handle_signals(handler: Any, *signums: int) -> Iterator[None]:
    """Around a block in which a function, or signal.SIG_IGN or the like, handles signals. Only Python's main thread can
    have it so: in others nothing changes."""
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
    """Around a command that loses nothing by a kill: Ctrl-C, SIGTERM and SIGUSR1 end it with a line."""

    def end(signum: int, _: Any) -> None:
        if is_first_process():
            going_on = "go on with --ckpt_path=newest" if command == "fit" else "the same command goes on from there"
            write_stderr(
                f"sdzero {command}: ended by {signal_name(signum)}. Finished generate calls are kept: {going_on}"
            )
            requeue(signum)
        exit_now(exit_status(signum))

    with handle_signals(end, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        yield


def requeue(signum: int) -> None:
    """Has SLURM start the job again, where SIGUSR1 announced its end. A stage leaves that to its `sdzero run`."""
    job = os.environ.get("SLURM_JOB_ID")
    if signum != signal.SIGUSR1 or job is None or STAGE in os.environ:
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if shutil.which("scontrol") is None:
        return write_stderr(f"SLURM job {job} is not requeued: there is no scontrol here")
    code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    write_stderr(
        f"SLURM job {job} is requeued" if code == 0 else f"SLURM job {job} is not requeued: scontrol ended with {code}"
    )


def exit_with_parent() -> None:
    """Ends this process soon after the one that PARENT names: a stage, or another rank, must not outlive it.

    It would go on beside the next run of the same folder, or wait in a collective for a rank that is no more.
    """
    parent = int(os.environ.pop(PARENT, 0))
    if not parent or (os.getppid() != parent and _is_alive(parent)):
        return  # an ancestor's ancestor: who started this process stands between them

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


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
    """Around a command that may start the other ranks of its node: they end with this process."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Around a call that may hang in native code, where no exception reaches it: after `seconds` the stacks of all
    threads are written and the process ends with status 1. There is one in a process at a time."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=stacks_file())
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def enable_crash_stacks() -> None:
    """Has a stage of `sdzero run` write its stacks where native code crashes it."""
    if STAGE in os.environ:
        faulthandler.enable(stacks_file())


def stacks_file() -> int:
    """Descriptor of the file that stacks go to: the stage's, for `sdzero run` to find; else stderr."""
    stage = os.environ.get(STAGE)
    if stage is None:
        return _STDERR
    global _descriptor
    if _descriptor is None:
        _descriptor = os.open(Path(stage) / STACKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    return _descriptor


_descriptor: int | None = None
