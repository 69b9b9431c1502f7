"""Comparison of outputs and values with the expected ones, outside the sandbox.

All functions take time linear in what a hostile program wrote.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import zip_longest
from typing import Any

_TOLERANCE = 1e-6  # of floats: allows another order of summation
_YES_NO = ("yes", "no")
_TOKEN = re.compile(r"\S+")
_OTHER = object()  # a value that JSON cannot represent; equals no expected value


def same_tokens(expected: str, output: str) -> bool:
    """Compare the words of two texts, ignoring white space and the case of yes and no."""
    if expected == output:
        return True
    return all(_same_token(*pair) for pair in zip_longest(_tokens(expected), _tokens(output)))


def same_lines(expected: str, output: str) -> bool:
    """Compare stripped lines by text or by the values of their numbers (LiveCodeBench's rule). NaN is not a number."""
    expected, output = expected.strip(), output.strip()
    if expected.count("\n") != output.count("\n"):  # before splitting: there may be millions of lines
        return False
    lines = (map(str.strip, text.split("\n")) for text in (expected, output))
    return all(one == other or _same_numbers(one, other) for one, other in zip(*lines, strict=True))


def same_value(expected: Any, value: Any) -> bool:
    """Compare a returned value with the expected one.

    Types count: `True` is not 1, `1` is not "1", and 2.0 is not an integer. Where a float is expected, integers are
    accepted, with an absolute or relative tolerance of 1e-6. Tuples equal lists, as in LiveCodeBench.

    Args:
        expected: a JSON value.
        value: the result of `decode_value`.
    """
    left = [(expected, value)]
    while left:  # iterative: hostile values are deeply nested
        one, other = left.pop()
        if isinstance(one, list | tuple):
            if type(other) is not list or len(one) != len(other):
                return False
            left += zip(one, other, strict=True)
        elif isinstance(one, dict):
            if type(other) is not dict or one.keys() != other.keys():
                return False
            left += ((one[key], other[key]) for key in one)
        elif type(one) is float:
            if not _is_close(one, other):
                return False
        elif type(one) is not type(other) or one != other:
            return False
    return True


def decode_value(line: bytes) -> tuple[bool, Any]:
    """Decode the output of call_runner.py as (a value was returned, the value).

    The submission may have written to it too. That gains it nothing over returning a value, since it does not know the
    expected one, but the line may hold anything.
    """
    if line.count(b"\n") != 1 or not line.endswith(b"\n"):
        return False, None
    try:
        return True, json.loads(line, object_hook=_untagged)
    except (ValueError, TypeError, RecursionError):
        return False, None


def _untagged(tagged: dict[str, Any]) -> Any:
    """Decode an object, by which the runner marks what is not plain JSON. Raises: ValueError, TypeError."""
    if tagged.keys() == {"int"}:
        return int(tagged["int"], 16)  # base 16 parses in linear time, at any length
    # strings only: chosen integers collide and would fill a dict in quadratic time
    if tagged.keys() == {"dict"} and all(type(key) is str for key, _ in tagged["dict"]):
        return dict(tagged["dict"])
    return _OTHER


def _tokens(text: str) -> Iterator[str]:
    return (found[0] for found in _TOKEN.finditer(text))


def _same_token(expected: str | None, token: str | None) -> bool:
    if expected == token:
        return True
    return expected is not None and token is not None and expected.lower() == token.lower() and token.lower() in _YES_NO


def _same_numbers(expected: str, line: str) -> bool:
    for one, other in zip_longest(_tokens(expected), _tokens(line)):
        number = _number(one)
        if number is None or number != _number(other):
            return False
    return True


def _number(token: str | None) -> Decimal | None:
    """Parse a token exactly. A Decimal stores a huge exponent at no cost."""
    try:
        number = Decimal(token or "")
    except InvalidOperation:
        return None
    return None if number.is_nan() else number


def _is_close(expected: float, value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isclose(expected, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    except OverflowError:  # an integer beyond the range of floats
        return False
