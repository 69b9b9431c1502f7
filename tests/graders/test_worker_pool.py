"""The pool's function is `eval` here: an item is what its worker executes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdzero.graders.errors import GraderError
from sdzero.graders.worker_pool import Failed, GraderPool

SLEEP = "__import__('time').sleep(60)"
LOOP = "9**9**9"  # a single interpreter operation, during which no signal handler runs
FILL = "bytearray(2**40)"
DIE = "__import__('os').kill(__import__('os').getpid(), 9)"
CRASH = "__import__('ctypes').string_at(0)"
MODULES = "sorted({'torch', 'numpy', 'sympy', 'pytest'} & {*__import__('sys').modules})"


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool[str, Any]]:
    pool = GraderPool[str, Any](eval, ("0", 0), 2, 0.2, 512)
    yield pool
    pool.close()


def test_results_come_in_order(pool: GraderPool[str, Any]) -> None:
    assert pool.map([str(n) for n in range(500)]) == [*range(500)]
    assert pool.map([]) == []


def test_items_run_side_by_side(pool: GraderPool[str, Any]) -> None:
    assert len({*pool.map(["[__import__('time').sleep(.05), __import__('os').getpid()][1]"] * 20)}) == 2


@pytest.mark.parametrize(
    ("item", "reason"), [(SLEEP, "timeout"), (LOOP, "timeout"), (FILL, "memory"), (DIE, "memory"), (CRASH, "memory")]
)
def test_a_bad_item_has_an_outcome_and_its_neighbours_are_untouched(pool: Any, item: str, reason: str) -> None:
    assert pool.map(["1", item, "2", "3"]) == [1, Failed(reason), 2, 3]  # pyright: ignore[reportArgumentType]


def test_the_deadline_counts_one_items_own_seconds(pool: GraderPool[str, Any]) -> None:
    """Twelve items of a quarter of the deadline each, on an overloaded machine."""
    clock = "__import__('time').process_time()"
    busy = f"(lambda begun: [*iter(lambda: {clock} - begun > .05, True)] and 7)({clock})"
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert pool.map([busy] * 12) == [7] * 12
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_an_item_whose_worker_dies_once_is_tried_again(pool: GraderPool[str, Any], tmp_path: Path) -> None:
    mark = f"__import__('pathlib').Path({str(tmp_path / 'mark')!r})"
    assert pool.map([f"7 if {mark}.exists() else [{mark}.touch(), {DIE}]", "1"]) == [7, 1]


def test_workers_hold_nothing_of_this_process(pool: GraderPool[str, Any]) -> None:
    assert "pytest" in sys.modules
    assert pool.map([MODULES]) == [[]]
    size = "int(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"
    (kib,) = pool.map([size])
    assert isinstance(kib, int) and kib < 80 * 1024


def test_strings_hash_alike_in_all_workers() -> None:
    hashes = [GraderPool[str, int](eval, ("0", 0), 1).map(["hash('x')"]) for _ in range(2)]
    assert hashes[0] == hashes[1]


def test_another_thread_may_use_it(pool: GraderPool[str, Any]) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.extend(pool.map(["1", LOOP, "2"]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1, Failed("timeout"), 2] * 2


def test_it_starts_again_after_it_was_closed(pool: GraderPool[str, Any]) -> None:
    pool.close()
    pool.close()
    assert pool.map(["1"]) == [1]


@pytest.mark.parametrize(
    ("warm_up", "message"),
    [
        (("1/0", 0), "warm-up of a grading worker failed: ZeroDivisionError"),
        (("1 + 1", 3), "gave 2, expected 3"),  # a broken library would mark every answer wrong
        (("__import__('os')._exit(3)", 0), "die during start-up"),
        ((CRASH, 0), "die during start-up"),
    ],
)
def test_workers_that_fail_their_warm_up_are_an_error(warm_up: tuple[str, int], message: str) -> None:
    with pytest.raises(GraderError, match=message):
        GraderPool[str, Any](eval, warm_up, 1).map(["1"])


def test_workers_that_die_on_every_item_are_an_error(tmp_path: Path) -> None:
    """Otherwise every item would seem to need too much memory."""
    mark = f"__import__('pathlib').Path({str(tmp_path / 'mark')!r})"
    warm_up = f"{DIE} if {mark}.exists() else 0"
    with pytest.raises(GraderError):
        GraderPool[str, Any](eval, (warm_up, 0), 1).map([f"[{mark}.touch(), {DIE}]"])


def test_an_exception_of_the_function_is_an_error_and_the_pool_goes_on(pool: GraderPool[str, Any]) -> None:
    with pytest.raises(GraderError, match="ZeroDivisionError: division by zero"):
        pool.map(["1", "1/0", "2"])
    assert pool.map(["3"]) == [3]


def test_a_stopped_worker_is_replaced() -> None:
    """It neither answers nor ends, and a large item fills its pipe."""
    pool = GraderPool[str, Any](eval, ("0", 0), 1, 0.1)
    (worker,) = pool.map(["__import__('os').getpid()"])
    assert isinstance(worker, int)
    os.kill(worker, signal.SIGSTOP)
    assert pool.map(["1" + " " * 2**20]) == [1]
    pool.close()


@pytest.mark.parametrize("settings", [{"num_workers": 0}, {"deadline": 0}, {"memory_mb": 0}])
def test_settings_below_their_least_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        GraderPool(eval, ("0", 0), **settings)


SCRIPT = """
import sys
print("the script ran", flush=True)
from sdzero.graders.worker_pool import GraderPool
pool = GraderPool(eval, ("0", 0), 2, 1.0)
print(pool.map(["1", "hasattr(__import__('sys').modules['__main__'], 'pool')"]), flush=True)
"""


@pytest.mark.parametrize("redirect", ["", "<&-", "<&- 2>&-"])
def test_a_script_without_a_guard_runs_once_and_ends(tmp_path: Path, redirect: str) -> None:
    """Also where its standard input, and error, are closed."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ["sh", "-c", f"exec {sys.executable} {tmp_path}/script.py {redirect}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines(), done.returncode) == (["the script ran", "[1, False]"], 0), done.stderr


def test_workers_outlive_a_killed_parent_by_no_more_than_the_deadline(tmp_path: Path) -> None:
    endless = f"__import__('os').symlink(str(__import__('os').getpid()), {str(tmp_path / 'pid')!r}) or {LOOP}"
    script = SCRIPT.replace('"1"', repr(endless))
    (tmp_path / "script.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (tmp_path / "pid").is_symlink():
        assert time.monotonic() < until
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    worker = Path("/proc") / os.readlink(tmp_path / "pid") / "stat"
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.1)
