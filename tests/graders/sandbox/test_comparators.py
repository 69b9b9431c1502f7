from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.graders.sandbox.call_runner import encode
from sdzero.graders.sandbox.comparators import decode_value, same_lines, same_tokens, same_value

# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "output", "same"),
    [
        ("1 2\r\n3\r\n", "1 2\n3", True),
        ("1 2\n3", "\n  1\t2   3\n\n", True),
        ("", " \n", True),
        ("YES\nno", "yes\nNO\n", True),
        ("1 2", "12", False),
        ("1 2", "1 2 3", False),
        ("1", "", False),
        ("1.0", "1", False),
        ("Alice", "alice", False),  # only yes and no lose their case
        ("NOT", "not", False),
        ("yes", "yes.", False),
    ],
)
def test_tokens(expected: str, output: str, same: bool) -> None:
    assert same_tokens(expected, output) is same


texts = st.text("ab01yesNO \n\r\t.", max_size=30) | st.text(max_size=20)


@given(texts, texts)
def test_tokens_as_a_slow_reference_has_them(expected: str, output: str) -> None:
    def canonical(text: str) -> list[str]:
        return [token.lower() if token.lower() in ("yes", "no") else token for token in text.split()]

    assert same_tokens(expected, output) == (canonical(expected) == canonical(output))
    assert same_tokens(expected, "\r\n".join(expected.split()))


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "output", "same"),
    [
        ("a b\nc", "a b\nc\n", True),
        ("a\r\nb\r\n", " a\nb ", True),
        ("0.50 1", "0.5 1.0", True),
        ("1e2", "100", True),
        ("a b", "a  b", False),  # white space within a line counts, unless they are numbers
        ("1 2", "1   2", True),
        ("1 2", "1\n2", False),
        ("1", "1\n2", False),
        ("1", "1 1", False),
        ("yes", "YES", False),
        ("a 1.0", "a 1", False),  # a line is text, or it is numbers
        ("0.1", "0.10000000000000000000001", False),  # decimals, not floats
        ("nan", "NaN", False),
        ("1", "sNaN", False),
        ("1", "\ud800", False),
        ("1", "1e1000000000000000000000", False),
        ("1e999999999999999999", "10e999999999999999998", True),
        ("nan", "nan", True),  # the same text
    ],
)
def test_lines(expected: str, output: str, same: bool) -> None:
    assert same_lines(expected, output) is same


numbers = st.lists(
    st.sampled_from(["1", "1.0", "01", "1e0", "2", "nan", "x", " ", "\n", "\r\n", "-0", "0.0"]), max_size=12
)


@given(numbers.map(" ".join), numbers.map(" ".join))
def test_lines_as_livecodebench_compares_them(expected: str, output: str) -> None:
    """LiveCodeBench's `grade_stdio`, which splits all lines and parses all numbers first."""

    def decimals(line: str) -> list[Decimal] | None:
        try:
            return [Decimal(token) for token in line.split()]
        except InvalidOperation:
            return None

    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (expected, output))
    same = len(ours) == len(theirs) and all(
        a == b or (decimals(a) is not None and decimals(a) == decimals(b)) for a, b in zip(ours, theirs, strict=True)
    )
    assert same_lines(expected, output) == same


# --- hostile output -------------------------------------------------------------------------------

SIZE = 2 * 2**20  # bytes: quadratic time would take hours
HOSTILE = {
    "words": "a " * (SIZE // 2),
    "spaces": "1" + " " * SIZE + "1",
    "lines": "1" + "\n" * SIZE + "1",
    "digits": "9" * SIZE,
    "decimals": "0." + "0" * SIZE + "1",
    "exponent": "1e" + "9" * SIZE,
    "numbers": "1.0 " * (SIZE // 4),
    "bytes": "\udc80" * SIZE,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("same", [same_tokens, same_lines])
def test_hostile_output_takes_linear_time(name: str, same: Callable[[str, str], bool]) -> None:
    output = HOSTILE[name]
    begin = time.process_time()
    assert not same("1 1\n2", output)
    assert not same(output[: len(output) // 2] + "x", output)  # as long as it is, and almost the same
    assert same(output, output + " ")
    assert time.process_time() - begin < 4


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "value", "same"),
    [
        (1, 1.0, False),
        (1, True, False),
        (True, 1, False),
        (None, None, True),
        (1, "1", False),
        ([1, [2]], [1, [2]], True),
        ([1, 2], [2, 1], False),
        ([True], [1], False),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 1}, False),
        (0.1 + 0.2, 0.3, True),
        (2.0, 2, True),
        (1.0, True, False),
        (1e9, 1e9 + 100, True),
        (1e9, 1e9 + 10_000, False),
        (0.5, 0.500002, False),
        (0.0, 1e-7, True),
        (1.0, 10**400, False),
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
        (1e308, math.inf, False),
        (math.nan, math.nan, False),
        (1.0, math.nan, False),
    ],
)
def test_values(expected: Any, value: Any, same: bool) -> None:
    assert same_value(expected, value) is same


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def line(value: Any) -> bytes:
    return json.dumps(encode(value)).encode() + b"\n"


@given(values)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert decode_value(line(value)) == (True, value)
    assert repr(decode_value(line(value))[1]) == repr(value)  # with its types
    assert same_value(value, decode_value(line(value))[1])


alike = st.recursive(
    st.sampled_from([0, 1, True, False, None, "1", 0.0, 1.0, 1.0000005, 1.00001, 10**400, math.inf]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@given(alike, alike)
def test_values_as_a_slow_reference_compares_them(expected: Any, value: Any) -> None:
    def same(one: Any, other: Any) -> bool:
        if type(one) is list and type(other) is list:
            return len(one) == len(other) and all(map(same, one, other))
        if type(one) is dict and type(other) is dict:
            return sorted(one) == sorted(other) and all(same(one[key], other[key]) for key in one)
        if type(one) is float and type(other) in (int, float):
            return one == other or (
                math.inf not in (one, other) and abs(Fraction(one) - Fraction(other)) < Fraction(1, 10**6)
            )
        return type(one) is type(other) and one == other

    assert same_value(expected, value) == same(expected, value)


def test_tuples_come_back_as_lists_and_huge_integers_as_they_were() -> None:
    assert decode_value(line((1, (2,)))) == (True, [1, [2]])
    huge = -(7**1_000_000)
    assert decode_value(line(huge)) == (True, huge)


@pytest.mark.parametrize("value", [{1}, {1: 2}, b"a", 1j, object(), int, lambda: 1, [{1}], {"a": {1}}])
def test_what_json_cannot_write_equals_nothing(value: Any) -> None:
    returned, decoded = decode_value(line(value))
    assert returned
    for expected in (None, True, 1, 1.0, "", [], {}, [None], {"a": None}, {"1": 2}):
        assert not same_value(expected, decoded)


def test_a_value_as_deep_as_may_be_comes_back_and_a_deeper_one_equals_nothing() -> None:
    def nested(depth: int) -> Any:
        value: Any = 1
        for _ in range(depth):
            value = {"a": [value]}
        return value

    assert decode_value(line(nested(100))) == (True, nested(100))
    assert not same_value(nested(101), decode_value(line(nested(101)))[1])
    itself: list[Any] = []
    itself.append(itself)
    assert decode_value(line(itself))[0]


def test_deep_values_are_compared_without_recursion() -> None:
    one, other = [], []
    for _ in range(100_000):
        one, other = [one], [other]
    assert same_value(one, other)


COLLIDING = json.dumps({"dict": [[(2**61 - 1) * i, 0] for i in range(200_000)]}).encode()


@pytest.mark.parametrize(
    ("forged", "returned"),
    [
        (b"", False),
        (b"1", False),
        (b"1\n2\n", False),
        (b"\n", False),
        (b"one\n", False),
        (b"\xff\n", False),
        (b"[" * 1_000_000 + b"\n", False),
        (b"[" * 100_000 + b"]" * 100_000 + b"\n", False),
        (b"9" * 1_000_000 + b"\n", False),
        (b'{"int": "x"}\n', False),
        (b'{"int": 5}\n', False),
        (b'{"dict": 5}\n', False),
        (b'{"dict": [5]}\n', False),
        (b'{"dict": [["a", 1, 2]]}\n', False),
        (b'{"dict": [[[], 1]]}\n', True),
        (b'{"int": "' + b"f" * SIZE + b'"}\n', True),
        (b"[" + b"1." + b"1" * SIZE + b"]\n", True),
        (COLLIDING + b"\n", True),
    ],
    ids=range(18),
)
def test_forged_lines(forged: bytes, returned: bool) -> None:
    begin = time.process_time()
    said, value = decode_value(forged)
    assert said is returned
    assert not same_value({"a": [1]}, value)
    assert time.process_time() - begin < 4
