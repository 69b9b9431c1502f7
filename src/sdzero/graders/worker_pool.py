"""Pool of killable grading workers, with a deadline and a memory limit for every item.

An item that exceeds its deadline, or whose worker dies twice, yields `Failed`. A failure that no item caused raises
`GraderError`.
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

from sdzero.graders.errors import GraderError, require_package
from sdzero.graders.spawn_context import CleanSpawnContext

if TYPE_CHECKING:
    from pebble import ProcessPool

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_POOLS = 5  # pools started in a row without any outcome
SPARE_LAUNCHES = 6  # workers, beyond a full set, that may die in a row before one is ready
WALL_FACTOR = 10  # wall-clock deadline of an item, as a multiple of its CPU deadline
STALL_SECONDS = 30.0  # beyond that, without any outcome: the pool hangs; covers a new worker's imports
_NO_MEMORY = 77  # exit status of a worker that reached its memory limit


@dataclass(frozen=True)
class Failed:
    """Outcome of an item that exceeded its deadline or the memory of a worker."""

    reason: Literal["timeout", "memory"]


@dataclass(frozen=True)
class _Died:
    code: int
    overdue: bool = False  # killed by the parent


class _WarmUpError(Exception):
    """A worker failed its warm-up."""


class GraderPool(Generic[Item, Result]):
    """Parallel map of a function over items in killable worker processes.

    The workers start at the first use and end with the pool or with this process. They neither re-run its main script
    nor inherit its modules. Thread-safe; batches run one after the other.

    Args:
        function: importable function of any module but `__main__`; items and results are pickled.
        warm_up: first item of every worker and its expected result; a worker that fails it raises `GraderError`.
        num_workers: number of processes.
        deadline: CPU seconds per item, after which its worker is killed.
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
        require_package("grading", "pebble", "math")
        self.function, self.warm_up = function, warm_up
        self.num_workers, self.deadline, self.memory_mb = num_workers, deadline, memory_mb
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._context, self._owner, self._progress = CleanSpawnContext(), os.getpid(), 0.0
        self._finalizer: Callable[[], None] | None = None

    def map(self, items: Sequence[Item]) -> list[Result | Failed]:
        """Return the outcome of every item, in order.

        Raises:
            GraderError: the workers cannot start, die whatever they grade, or `function` raised.
        """
        with self._lock:
            try:
                outcomes = self._run(items)
                return [
                    self._retry(item, outcome) if isinstance(outcome, _Died) else outcome
                    for item, outcome in zip(items, outcomes, strict=True)
                ]
            except BaseException:  # the rest of this batch must not delay the next one
                self.close()
                raise

    def close(self) -> None:
        """Stop the workers; the next use starts new ones."""
        if self._finalizer:
            self._finalizer()
        self._pool = self._finalizer = None

    def _retry(self, item: Item, first: _Died) -> Result | Failed:
        """Rerun an item whose worker died, alone: the cause may have been a stray signal."""
        (outcome,) = self._run([item])
        if not isinstance(outcome, _Died):
            return outcome
        (healthy,) = self._run([self.warm_up[0]])
        if isinstance(healthy, _Died | Failed):
            raise GraderError(f"grading workers die on every item (exit status {first.code}, then {outcome.code})")
        return Failed("timeout" if outcome.overdue else "memory")

    def _run(self, items: Sequence[Item]) -> list[Any]:
        """Return results, `Failed` and `_Died`. Replaces a pool that breaks or stalls and reruns unfinished items."""
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
                if starts == MAX_POOLS:
                    raise GraderError(f"grading: {starts} worker pools in a row returned no result")
                log.warning("grading: the workers stopped responding; starting new ones")
        return [outcomes[number] for number in range(len(items))]

    def _outcomes(self, items: Sequence[Item]) -> Iterator[Any]:
        """Yield outcomes in order, until the pool breaks."""
        try:
            pool = self._ensure_pool()
            futures = [pool.schedule(_work, (item,), timeout=WALL_FACTOR * self.deadline) for item in items]
        except RuntimeError as error:  # pebble's, if the pool has broken meanwhile
            log.warning("grading: %s", error)
            return
        self._record_progress()
        for future in futures:
            future.add_done_callback(self._record_progress)
        for future in futures:
            if not self._wait_for(future, pool):
                return
            error = None if future.cancelled() else future.exception()
            name = type(error).__name__
            if isinstance(error, TimeoutError):  # also if pebble missed that the worker died
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

    def _wait_for(self, future: Future[Any], pool: ProcessPool) -> bool:
        """Wait for a future. False: the pool broke, or returned nothing at all for too long."""
        while not wait([future], timeout=0.5).done:
            if not pool.active:  # pebble drops the queued items
                return future.done()
            if self._context.launches > self.num_workers + SPARE_LAUNCHES:
                self.close()
                raise GraderError("grading workers die during start-up: see their messages above")
            if time.monotonic() - self._progress > WALL_FACTOR * self.deadline + STALL_SECONDS:
                return False
        return True

    def _record_progress(self, _: object = None) -> None:
        self._progress, self._context.launches = time.monotonic(), 0

    def _ensure_pool(self) -> ProcessPool:
        if self._owner != os.getpid():  # a fork inherits the pool object but not its threads
            self._pool, self._owner = None, os.getpid()
        if self._pool is None or not self._pool.active:
            self.close()
            from pebble import ProcessPool

            _fill_standard_descriptors()
            arguments = (self.function, self.warm_up, self.memory_mb * 2**20, self.deadline)
            self._context = context = CleanSpawnContext()
            self._pool = ProcessPool(self.num_workers, 0, _init_worker, arguments, cast(Any, context))
            self._finalizer = weakref.finalize(self, _stop, self._pool, os.getpid())
        return self._pool


def _stop(pool: ProcessPool, owner: int) -> None:
    if os.getpid() == owner:
        pool.stop()
        pool.join()


def _fill_standard_descriptors() -> None:
    """Open closed standard descriptors, so that no pipe to a worker becomes 0, 1 or 2."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


# --- in the worker --------------------------------------------------------------------------------

_function: Callable[[Any], Any] | None = None
_fault = ""
_deadline = 0.0


def _init_worker(function: Callable[[Any], Any], warm_up: tuple[Any, Any], memory: int, deadline: float) -> None:
    global _function, _fault, _deadline
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it even inside one long multiplication
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _function, _deadline = function, deadline
    item, expected = warm_up
    try:
        if (result := function(item)) != expected:  # a broken library would mark every answer wrong
            _fault = f"warm-up of a grading worker: {item!r} gave {result!r}, expected {expected!r}"
    except Exception as error:  # noqa: BLE001 - the parent reports it
        _fault = f"warm-up of a grading worker failed: {type(error).__name__}: {error}"


def _work(item: Any) -> Any:
    if _fault or _function is None:
        raise _WarmUpError(_fault)
    # The kernel ends this process even inside one long multiplication, or if the parent is gone. It counts CPU time:
    # on a busy machine, a wall-clock deadline would turn a slow answer into a wrong one.
    signal.setitimer(signal.ITIMER_PROF, _deadline)
    try:
        return _function(item)
    except MemoryError:
        os._exit(_NO_MEMORY)  # the next item gets a fresh worker
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
