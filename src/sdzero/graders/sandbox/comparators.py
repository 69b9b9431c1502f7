"""Is an answer right? Asked outside the sandbox of what a hostile program wrote: all here take time linear in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import zip_longest
from typing import Any

_TOLERANCE = 1e-6  # of floating-point results: another order of summation is no error
_YES_NO = ("yes", "no")
_TOKEN = re.compile(r"\S+")
_OTHER = object()  # a value that JSON cannot write; equal to no expected one


def same_tokens(expected: str, output: str) -> bool:
    """Whether both hold the same words, however they are spaced; the case of yes and no does not matter."""
    if expected == output:
        return True
    return all(_same_token(*pair) for pair in zip_longest(_tokens(expected), _tokens(output)))


def same_lines(expected: str, output: str) -> bool:
    """LiveCodeBench's rule: line by line, stripped, the same text or numbers of the same values. NaN is no number."""
    expected, output = expected.strip(), output.strip()
    if expected.count("\n") != output.count("\n"):  # before the lines are made: there may be millions
        return False
    lines = (map(str.strip, text.split("\n")) for text in (expected, output))
    return all(one == other or _same_numbers(one, other) for one, other in zip(*lines, strict=True))


def same_value(expected: Any, value: Any) -> bool:
    """Whether a function returned what it should.

    Types count: `True` is not 1, `1` is not "1", and 2.0 is no integer. Where a float is expected, an integer will do,
    and a number as near as 1e-6 (absolutely or relatively) is right. Tuples are lists, as in LiveCodeBench.

    Args:
        expected: what JSON can write.
        value: from `decode_value`.
    """
    left = [(expected, value)]
    while left:  # no recursion: hostile values are deep
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
    """What call_runner.py wrote: (whether a value was returned, that value).

    A submission may have written there too. That gives it no more than returning a value does, since it does not know
    the expected one, but the line may be anything.
    """
    if line.count(b"\n") != 1 or not line.endswith(b"\n"):
        return False, None
    try:
        return True, json.loads(line, object_hook=_untagged)
    except (ValueError, TypeError, RecursionError):
        return False, None


def _untagged(tagged: dict[str, Any]) -> Any:
    """The value of an object, with which the runner marks what is not plain JSON. Raises: ValueError, TypeError."""
    if tagged.keys() == {"int"}:
        return int(tagged["int"], 16)  # base 16 is read in linear time, and at any length
    # text only: colliding integers, which anyone can choose, would fill a dict in quadratic time
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
    """A token's value, exactly. A Decimal keeps a huge exponent as it is written: it costs nothing."""
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
    except OverflowError:  # an integer beyond all floats
        return False
