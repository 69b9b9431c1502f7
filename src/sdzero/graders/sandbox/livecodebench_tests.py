"""Tests of a LiveCodeBench row. The private ones are a pickle, which is parsed and never executed."""

from __future__ import annotations

import base64
import json
import pickletools
import zlib
from typing import Any

from sdzero.graders.sandbox.types import CallTest, StdioTest, Test

MAX_BYTES = 512 * 2**20
_STRINGS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_AROUND = {"PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP"}  # opcodes around a single string


def read_tests(public: str, private: str, metadata: str, max_bytes: int = MAX_BYTES) -> tuple[Test, ...]:
    """Read the public tests, then the private ones.

    Args:
        public: column `public_test_cases`, JSON.
        private: column `private_test_cases`: JSON, or a base64-encoded, zlib-compressed pickle of a JSON string.
        metadata: column `metadata`, JSON; with `func_name`, the tests are calls of that function.
        max_bytes: maximum decompressed size of the private tests.

    Raises:
        ValueError: a column is invalid; names it.
    """
    if not private.lstrip().startswith("["):
        private = _read_column("private_test_cases", _unpack, private, max_bytes)
    columns = {"public_test_cases": public, "private_test_cases": private}
    rows = [row for column, text in columns.items() for row in _read_column(column, _rows, text)]
    if not rows:
        raise ValueError("public_test_cases and private_test_cases are empty")
    described = _read_column("metadata", json.loads, metadata)
    name = described.get("func_name") if isinstance(described, dict) else None
    if not name:
        return tuple(StdioTest(row["input"], row["output"]) for row in rows)
    return tuple(_read_column(f"test {number}", _call, name, row) for number, row in enumerate(rows, 1))


def _read_column(name: str, read: Any, *args: Any) -> Any:
    try:
        return read(*args)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{name}: {error}") from None
    except RecursionError:
        raise ValueError(f"{name}: nested too deeply") from None


def _rows(text: str) -> list[dict[str, str]]:
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError(f"expected a list of tests, got a {type(rows).__name__}")
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("input", "output")):
            raise ValueError("expected tests with the strings 'input' and 'output'")
    return rows


def _call(name: str, row: dict[str, str]) -> CallTest:
    lines = row["input"].strip()
    args = tuple(json.loads(line) for line in lines.split("\n")) if lines else ()
    return CallTest(name, args, json.loads(row["output"]))


def _unpack(private: str, max_bytes: int) -> str:
    stream = zlib.decompressobj()
    pickled = stream.decompress(base64.b64decode(private, validate=True), max_bytes + 1)
    if len(pickled) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes when decompressed")
    if not stream.eof:
        raise ValueError("the compressed data is truncated")
    return _unpickle_text(pickled)


def _unpickle_text(pickled: bytes) -> str:
    """Extract the single string of a pickle. No unpickler runs: even one without classes can be made to fill memory."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in _STRINGS and not texts:
            texts.append(str(argument))
        elif opcode.name not in _AROUND:
            raise ValueError(f"the pickle must hold one string and nothing else, but has {opcode.name}")
    if not texts:
        raise ValueError("the pickle holds no string")
    return texts[0]
