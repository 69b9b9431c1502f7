"""Call of one function of a submission, inside the sandbox. Standalone file for any python3 from 3.9 on.

`python3 -I -S call_runner.py` reads {"source", "call", "args"} as JSON from standard input and writes the returned
value as one line of JSON to its original standard output. What the submission prints goes to standard error.

The expected value is never sent here. A submission that manipulates this file can only choose the value it appears to
return, which it is free to do anyway. It cannot return an object with an equality of its own: only exact builtin types
are written, and every other value is marked as such.
"""

from __future__ import annotations

import os
import sys
from json import dumps, loads  # own references: a submission may replace the modules' functions
from os import _exit, write
from traceback import print_exc
from types import ModuleType
from typing import Any

MAX_DEPTH = 200  # of nesting; a deeper or recursive value equals nothing
_PLAIN = 2**63


def encode(value: Any, depth: int = 0) -> Any:
    """Encode a value as JSON without losing its type; objects mark what is not plain JSON."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:  # Python cannot parse thousands of decimal digits, but it can in base 16
        return value if -_PLAIN <= value < _PLAIN else {"int": format(value, "x")}
    if kind in (list, tuple) and depth < MAX_DEPTH:
        return [encode(item, depth + 1) for item in value]
    if kind is dict and depth < MAX_DEPTH and all(type(key) is str for key in value):
        return {"dict": [[key, encode(item, depth + 1)] for key, item in value.items()]}
    return {"other": None}


def call_function(source: str, call: str, args: list[Any]) -> Any:
    """Call the submission's function, or a method of its class Solution, and return its result.

    The module is not named `__main__`, so a main block does not run. Names of `typing` need no import: starter code
    uses them without one.
    """
    module = sys.modules["submission"] = ModuleType("submission")  # dataclasses and pickle look it up
    exec("from typing import *", module.__dict__)
    exec(compile(source, "submission.py", "exec", dont_inherit=True), module.__dict__)
    solution = getattr(module, "Solution", None)
    if isinstance(solution, type) and hasattr(solution, call):
        return getattr(solution(), call)(*args)
    return getattr(module, call)(*args)


def main() -> None:
    request = loads(sys.stdin.buffer.read())
    results = os.dup(1)  # not inherited by child processes
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        line = dumps(encode(call_function(request["source"], request["call"], request["args"]))).encode() + b"\n"
    except BaseException:  # noqa: BLE001 - the function did not return; SystemExit is a failure too
        try:
            print_exc()
        finally:
            _exit(1)
    while line:
        line = line[write(results, line) :]
    _exit(0)  # skips the submission's exit handlers


if __name__ == "__main__":
    main()
