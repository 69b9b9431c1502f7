"""The call runner, without the sandbox."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import sdzero.graders.sandbox.call_runner
from graders.sandbox.forging import FORGING
from sdzero.graders.sandbox.comparators import decode_value, same_value

RUNNER = sdzero.graders.sandbox.call_runner.__file__


def run(source: str, *args: Any, call: str = "f", python: str = sys.executable) -> subprocess.CompletedProcess[bytes]:
    request = json.dumps({"source": source, "call": call, "args": args}).encode()
    return subprocess.run([python, "-I", "-S", "-B", RUNNER], input=request, capture_output=True, timeout=60)


def value(source: str, *args: Any, call: str = "f") -> Any:
    done = run(source, *args, call=call)
    assert done.returncode == 0, done.stderr.decode()
    returned, value = decode_value(done.stdout)
    assert returned
    return value


# --- what is called -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "def f(a, b): return a + b",
        "class Solution:\n    def f(self, a, b): return a + b",
        "class Solution:\n    def f(self, a, b): return a + b\ndef f(a, b): return None",
        "class Solution: pass\ndef f(a, b): return a + b",
        "Solution = 5\ndef f(a, b): return a + b",
        "class Solution:\n    @staticmethod\n    def f(a, b): return a + b",
        "f = lambda a, b: a + b",
        "from __future__ import annotations\nimport operator\nf = operator.add",
        "class Solution:\n    def f(self, a: List[int], b: Optional[List]): return a + b",  # names of typing
    ],
)
def test_a_function_or_a_method_is_called(source: str) -> None:
    assert value(source, [1], [2]) == [1, 2]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("1", 1),
        ("True", True),
        ("1.5", 1.5),
        ("float('inf')", float("inf")),
        ("None", None),
        ("'ä\\ud800'", "ä\ud800"),
        ("[1, (2, 3)]", [1, [2, 3]]),
        ("{'a': [1], 'b': True}", {"a": [1], "b": True}),
        ("-7 ** 99", -(7**99)),
    ],
)
def test_results_come_back_with_their_types(result: str, expected: Any) -> None:
    found = value(f"def f(): return {result}")
    assert found == expected and type(found) is type(expected)


def test_no_main_block_runs_and_classes_find_their_module() -> None:
    source = """
import dataclasses, pickle, __main__
@dataclasses.dataclass
class Point:
    x: int
if __name__ == "__main__":
    raise SystemExit(input())
def f(): return [__name__, Point.__module__, pickle.loads(pickle.dumps(Point(3))).x]
"""
    assert value(source) == ["submission", "submission", 3]


def test_printing_and_reading_do_not_touch_the_result() -> None:
    source = """
import os, sys, subprocess
print("{}", flush=True)
def f():
    os.write(1, b"5\\n")
    os.system("echo 6")
    print("7")
    return [sys.stdin.read(), os.read(0, 10).decode()]
"""
    done = run(source)
    assert decode_value(done.stdout) == (True, ["", ""])
    assert done.stderr == b"{}\n5\n6\n"


@pytest.mark.skipif(not os.path.exists("/usr/bin/python3"), reason="no python3 of the system")
def test_the_systems_interpreter_runs_it() -> None:
    done = run("def f(a): return {'a': a * 10 ** 30}", 3, python="/usr/bin/python3")
    assert decode_value(done.stdout) == (True, {"a": 3 * 10**30})


# --- what fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("def f(): return 1 / 0", b"ZeroDivisionError: division by zero"),
        ("def f(: pass", b"SyntaxError: "),
        ("def g(): pass", b"AttributeError: "),
        ("def f(): f()", b"RecursionError: "),
        ("import sys\ndef f(): sys.exit(0)", b"SystemExit: 0"),
        ("raise SystemExit", b"SystemExit"),
        ("class Bad(BaseException): pass\ndef f(): raise Bad", b"submission.Bad"),
        ("def f(a): return a", b"TypeError: "),
    ],
)
def test_what_returns_nothing_ends_in_a_traceback(source: str, last: bytes) -> None:
    done = run(source)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"Traceback (most recent call last):")
    assert done.stderr.strip().rpartition(b"\n")[2].startswith(last)


@pytest.mark.parametrize("name", FORGING)
def test_forging_gets_no_value_accepted(name: str) -> None:
    returned, value = decode_value(run(FORGING[name]).stdout)
    assert not (returned and any(same_value(expected, value) for expected in (42, [42], "42")))


def test_no_frame_holds_more_than_the_request() -> None:
    """A submission that searches all frames finds its own request, without the expected value."""
    source = """
import sys
def f(a):
    frame, found = sys._getframe(), {}
    while frame:
        found.update(frame.f_locals)
        frame = frame.f_back
    return sorted(found["request"])
"""
    assert value(source, 1) == ["args", "call", "source"]


def test_a_value_that_contains_itself_and_one_that_is_huge() -> None:
    assert run("a = []\na.append(a)\ndef f(): return a").returncode == 0
    assert len(value("def f(): return [1] * 300_000")) == 300_000  # far more than a pipe holds
    assert value("def f(): return 7 ** 99_999") == 7**99_999  # more digits than Python would read
