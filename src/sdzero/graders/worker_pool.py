"""Grading in processes that can be killed: a deadline and a memory limit for every item, the same outcome each time.

An item that overruns its deadline, or whose worker dies twice, has an outcome of its own (`Failed`). What goes wrong
without an item being to blame is a `GraderError`.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from sdzero.graders.errors import GraderError
from sdzero.graders.spawn_context import Context

if TYPE_CHECKING:
    from pebble import ProcessPool

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

STARTS = 5  # pools that are started for one batch without any outcome in between
SPARE_LAUNCHES = 6  # workers, beyond a full set, that may die one after the other before one is ready
WALL = 10  # deadlines on the clock after which the parent ends a worker that does not compute, or not alone
STALL = 30.0  # seconds beyond that in which something must come back, a fresh worker's imports included
_NO_MEMORY = 77  # exit status of a worker that met its memory limit


@dataclass(frozen=True)
class Failed:
    """An item without a result: it overran the deadline, or needs more memory than a worker has."""

    reason: Literal["timeout", "memory"]


@dataclass(frozen=True)
class _Died:
    code: int
    overdue: bool = False  # ended by the parent


class _Fault(Exception):
    """A worker could not be made ready; the message is the error's."""


class GraderPool(Generic[Item, Result]):
    """A function, run on items side by side in worker processes.

    The workers start at the first use and end with the pool, or with this process. They neither run this process'
    main script again nor inherit its modules. May be used from any thread; batches take turns.

    Args:
        function: importable by its name from any module but `__main__`; items and results are pickled.
        warm_up: an item that every worker runs before it takes any other, and the result that it must have; a worker
            that fails at it is a `GraderError`.
        num_workers: processes.
        deadline: seconds of CPU time for one item, from when it begins to run; then its worker is killed.
        memory_mb: address space of a worker, in MiB.

    Raises:
        ModuleNotFoundError: pebble is not installed; names the extra.
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
        _needs_pebble()
        self.function, self.warm_up = function, warm_up
        self.num_workers, self.deadline, self.memory_mb = num_workers, deadline, memory_mb
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._context, self._owner, self._progress = Context(), os.getpid(), 0.0
        self._finalizer: Callable[[], None] | None = None

    def map(self, items: Sequence[Item]) -> list[Result | Failed]:
        """The outcome of every item, in order.

        Raises:
            GraderError: workers cannot start or die without an item, or `function` raised, which it must not.
        """
        with self._lock:
            try:
                outcomes = self._run(items)
                return [
                    self._again(item, outcome) if isinstance(outcome, _Died) else outcome
                    for item, outcome in zip(items, outcomes, strict=True)
                ]
            except BaseException:  # the rest of the batch must not run ahead of the next one
                self.close()
                raise

    def close(self) -> None:
        """Ends the workers; the next use starts new ones."""
        if self._finalizer:
            self._finalizer()
        self._pool = self._finalizer = None

    def _again(self, item: Item, first: _Died) -> Result | Failed:
        """An item whose worker died, with nothing beside it now: a stray signal is not its fault."""
        (outcome,) = self._run([item])
        if not isinstance(outcome, _Died):
            return outcome
        (healthy,) = self._run([self.warm_up[0]])
        if isinstance(healthy, _Died | Failed):
            raise GraderError(
                f"grading workers die (exit status {first.code}, then {outcome.code}) whatever they grade"
            )
        return Failed("timeout" if outcome.overdue else "memory")

    def _run(self, items: Sequence[Item]) -> list[Any]:
        """Results, `Failed` and `_Died`. A pool that breaks or stalls is replaced; what was outstanding runs again."""
        outcomes: dict[int, Any] = {}
        starts = 0
        while len(outcomes) < len(items):
            before = len(outcomes)
            left = [number for number in range(len(items)) if number not in outcomes]
            for number, outcome in zip(left, self._outcomes([items[n] for n in left]), strict=False):
                outcomes[number] = outcome
            if len(outcomes) < len(items):
                self.close()
                starts = starts + 1 if len(outcomes) == before else 0
                if starts == STARTS:
                    raise GraderError(f"grading: {starts} pools of workers, one after the other, brought no result")
                log.warning("grading: the workers came to a halt; starting others")
        return [outcomes[number] for number in range(len(items))]

    def _outcomes(self, items: Sequence[Item]) -> Iterator[Any]:
        """Outcomes in order, until the pool breaks."""
        try:
            pool = self._started()
            futures = [pool.schedule(_work, (item,), timeout=WALL * self.deadline) for item in items]
        except RuntimeError as error:  # pebble's own, where a pool has broken meanwhile
            log.warning("grading: %s", error)
            return
        self._note()
        for future in futures:
            future.add_done_callback(self._note)
        for future in futures:
            if not self._arrives(future, pool):
                return
            error = None if future.cancelled() else future.exception()
            name = type(error).__name__
            if isinstance(error, TimeoutError):  # so also where pebble has missed that the worker died
                yield _Died(-signal.SIGKILL, overdue=True)
            elif name == "ProcessExpired":
                code = getattr(error, "exitcode", 0)
                yield Failed("timeout") if code == -signal.SIGPROF else _Died(code)
            elif future.cancelled() or name in ("BrokenProcessPool", "CancelledError"):
                return
            elif error:
                raise GraderError(f"grading failed: {name}: {error}") from error
            else:
                yield future.result()

    def _arrives(self, future: Future[Any], pool: ProcessPool) -> bool:
        """Waits for it. False: the pool has broken, or nothing at all has come back for too long."""
        while not wait([future], timeout=0.5).done:
            if not pool.active:  # pebble forgets what stood in line
                return future.done()
            if self._context.launches > self.num_workers + SPARE_LAUNCHES:
                self.close()
                raise GraderError("grading workers die before they are ready: see their messages above")
            if time.monotonic() - self._progress > WALL * self.deadline + STALL:
                return False
        return True

    def _note(self, _: object = None) -> None:
        self._progress, self._context.launches = time.monotonic(), 0

    def _started(self) -> ProcessPool:
        if self._owner != os.getpid():  # a fork has the pool's object, but not its threads
            self._pool, self._owner = None, os.getpid()
        if self._pool is None or not self._pool.active:
            self.close()
            from pebble import ProcessPool

            _fill_standard_descriptors()
            arguments = (self.function, self.warm_up, self.memory_mb * 2**20, self.deadline)
            self._context = context = Context()
            self._pool = ProcessPool(self.num_workers, 0, _begin, arguments, cast(Any, context))
            self._finalizer = weakref.finalize(self, _stop, self._pool, os.getpid())
        return self._pool


def _needs_pebble() -> None:
    try:
        import pebble  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'grading mathematics needs the package pebble: pip install "sdzero[math]"', name=error.name
        ) from error


def _stop(pool: ProcessPool, owner: int) -> None:
    if os.getpid() == owner:
        pool.stop()
        pool.join()


def _fill_standard_descriptors() -> None:
    """A pipe to a worker must not become descriptor 0, 1 or 2 where this process has one of them closed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


# --- in the worker --------------------------------------------------------------------------------

_function: Callable[[Any], Any] | None = None
_fault = ""
_deadline = 0.0


def _begin(function: Callable[[Any], Any], warm_up: tuple[Any, Any], memory: int, deadline: float) -> None:
    global _function, _fault, _deadline
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it inside one long multiplication too
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _function, _deadline = function, deadline
    item, expected = warm_up
    try:
        if (result := function(item)) != expected:  # e.g. a library that reads nothing here would fail every answer
            _fault = f"a grading worker makes {result!r} of {item!r}, which is {expected!r}"
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        _fault = f"a grading worker cannot be made ready: {type(error).__name__}: {error}"


def _work(item: Any) -> Any:
    if _fault or _function is None:
        raise _Fault(_fault)
    # The kernel ends this process, inside one long multiplication too, and where the parent is gone. It counts the
    # process's own CPU time: on a busy machine, a deadline on the clock would make a wrong answer of a slow one.
    signal.setitimer(signal.ITIMER_PROF, _deadline)
    try:
        return _function(item)
    except MemoryError:
        os._exit(_NO_MEMORY)  # the next item gets a worker with all of its memory
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
