"""Pool of killable grading workers, with a deadline and a memory limit for every item.

An item that exceeds its deadline, or whose worker dies twice, yields `Failed`. A failure that no item caused raises
`GraderError`.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, Literal, TypeVar

from sdzero.graders.errors import GraderError

Item = TypeVar("Item")
Result = TypeVar("Result")

WALL_FACTOR = 10  # wall-clock deadline of an item, as a multiple of its CPU deadline
_NUM_STARTS = 5  # of a worker that dies during its start
_START_SECONDS = 120.0  # for a worker's imports and warm-up
_NO_MEMORY = 77  # exit status of a worker that reached its memory limit


@dataclass(frozen=True)
class Failed:
    """Outcome of an item that exceeded its deadline or the memory of a worker."""

    reason: Literal["timeout", "memory"]


@dataclass(frozen=True)
class _Died:
    code: int
    overdue: bool = False  # killed at the wall-clock deadline


class _Worker:
    """Worker process, which forks a child that answers and replaces it when it dies, and the connection to both.

    Neither re-runs this process's main script, which may lack a guard and import torch, nor inherits its modules. All
    workers hash strings alike, since sympy depends on the order of sets.
    """

    def __init__(self) -> None:
        _fill_standard_descriptors()
        self.connection, theirs = Pipe()
        command = [sys.executable, "-P", "-c", f"from {__name__} import _serve; _serve({theirs.fileno()})"]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "pass_fds": [theirs.fileno()], "env": environment}
        with theirs:
            self.process = subprocess.Popen(command, start_new_session=True, **options)
        self._number = 0  # of the last message: a child may die after its answer

    def ask(self, message: Any, seconds: float) -> tuple[str, Any] | _Died:
        """Send a message and return (fault, result). Kills the worker after `seconds`."""
        self._number += 1
        began = time.monotonic()
        killer = threading.Timer(seconds, self.kill)
        killer.start()
        try:
            self.connection.send((self._number, message))
            while True:
                number, *answer = self.connection.recv()
                if number == self._number:
                    return answer[0], answer[1]
                if number is None:
                    return _Died(answer[0])
        except (EOFError, OSError):
            return _Died(self.process.wait(), overdue=time.monotonic() - began >= seconds)
        finally:
            killer.cancel()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class GraderPool(Generic[Item, Result]):
    """Parallel map of a function over items in killable worker processes.

    The workers start at the first use and end with the pool or with this process. Thread-safe; batches run one after
    the other.

    Args:
        function: importable function of any module but `__main__`; items and results are pickled.
        warm_up: first item of every worker and its expected result; a worker that fails it raises `GraderError`.
        num_workers: number of processes.
        deadline: CPU seconds per item, after which its worker is killed.
        memory_mb: address space of a worker, in MiB.
    """

    def __init__(
        self,
        function: Callable[[Item], Result],
        warm_up: tuple[Item, Result],
        num_workers: int = 2,
        deadline: float = 3.0,
        memory_mb: int = 2048,
    ) -> None:
        if num_workers < 1 or deadline <= 0 or memory_mb <= 0:
            raise ValueError(f"num_workers={num_workers}, deadline={deadline}, memory_mb={memory_mb}: must be above 0")
        self.function, self.warm_up = function, warm_up
        self.num_workers, self.deadline, self.memory_mb = num_workers, deadline, memory_mb
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._owner = os.getpid()
        weakref.finalize(self, _stop, self._idle, self._owner)

    def map(self, items: Sequence[Item]) -> list[Result | Failed]:
        """Return the outcome of every item, in order.

        Raises:
            GraderError: the workers cannot start, die whatever they grade, or `function` raised.
        """
        with self._lock:
            if self._owner != os.getpid():  # the workers are those of the process that forked this one
                self._idle, self._owner = [], os.getpid()
            with ThreadPoolExecutor(self.num_workers) as threads:  # an error cancels the items that have not begun
                outcomes = [*threads.map(self._run, items)]
            return [
                self._retry(item, outcome) if isinstance(outcome, _Died) else outcome
                for item, outcome in zip(items, outcomes, strict=True)
            ]

    def close(self) -> None:
        """Stop the workers; the next use starts new ones."""
        _stop(self._idle, self._owner)

    def _retry(self, item: Item, first: _Died) -> Result | Failed:
        """Rerun an item whose worker died, alone: the cause may have been a stray signal."""
        outcome = self._run(item)
        if not isinstance(outcome, _Died):
            return outcome
        if isinstance(self._run(self.warm_up[0]), _Died | Failed):
            raise GraderError(f"grading workers die on every item (exit status {first.code}, then {outcome.code})")
        return Failed("timeout" if outcome.overdue else "memory")

    def _run(self, item: Item) -> Result | Failed | _Died:
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = self._start()
        answer = worker.ask(item, WALL_FACTOR * self.deadline)
        if worker.process.returncode is None:
            self._idle.append(worker)
        if isinstance(answer, _Died):
            return Failed("timeout") if answer.code == -signal.SIGPROF else answer
        fault, result = answer
        if fault:
            raise GraderError(f"grading failed: {fault}")
        return result

    def _start(self) -> _Worker:
        settings = (self.function, self.warm_up, self.memory_mb * 2**20, self.deadline)
        for _ in range(_NUM_STARTS):
            worker = _Worker()
            answer = worker.ask(settings, _START_SECONDS)
            if isinstance(answer, _Died):
                continue
            if answer[0]:
                raise GraderError(answer[0])
            return worker
        raise GraderError("grading workers die during start-up: see their messages above")


def _stop(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a fork inherits the objects, not the processes
        return
    while workers:
        worker = workers.pop()
        worker.connection.close()
        worker.kill()
        worker.process.wait()


def _fill_standard_descriptors() -> None:
    """Open closed standard descriptors, so that no pipe to a worker becomes 0, 1 or 2."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


# --- in the worker --------------------------------------------------------------------------------


def _serve(descriptor: int) -> None:
    """Warm up once, then keep a child that answers, until the parent is gone.

    Answers are (number of the message, fault or "", result), or (None, exit status) of a child that died.
    """
    for number in (signal.SIGTERM, signal.SIGPROF):  # end a process even inside one long multiplication
        signal.signal(number, signal.SIG_DFL)
    connection = Connection(descriptor)
    with suppress(EOFError, ConnectionError):
        number, (function, warm_up, memory, deadline) = connection.recv()
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        connection.send((number, _warm_up(function, *warm_up), None))
        while child := os.fork():  # a fork has the modules and caches of the warm-up
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == 0:
                return
            connection.send((None, code))
        while True:
            _answer(connection, function, deadline)


def _warm_up(function: Callable[[Any], Any], item: Any, expected: Any) -> str:
    try:
        result = function(item)
    except Exception as error:  # noqa: BLE001 - the parent reports it
        return f"warm-up of a grading worker failed: {type(error).__name__}: {error}"
    if result == expected:
        return ""
    # a broken library would mark every answer wrong
    return f"warm-up of a grading worker: {item!r} gave {result!r}, expected {expected!r}"


def _answer(connection: Connection, function: Callable[[Any], Any], deadline: float) -> None:
    number, item = connection.recv()
    # The kernel ends this process even inside one long multiplication, or if the parent is gone. It counts CPU time:
    # on a busy machine, a wall-clock deadline would turn a slow answer into a wrong one.
    signal.setitimer(signal.ITIMER_PROF, deadline)
    try:
        answer = "", function(item)
    except MemoryError:
        os._exit(_NO_MEMORY)  # the next item gets a fresh process
    except Exception as error:  # noqa: BLE001 - the parent reports it
        answer = f"{type(error).__name__}: {error}", None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    connection.send((number, *answer))
