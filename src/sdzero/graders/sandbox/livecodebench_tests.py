"""The tests of a LiveCodeBench row, whose private ones are a pickle: it is read as text, and never run."""

from __future__ import annotations

import base64
import json
import pickletools
import zlib
from typing import Any

from sdzero.graders.sandbox.types import CallTest, StdioTest, Test

MAX_BYTES = 512 * 2**20
_STRINGS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_AROUND = {"PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP"}  # what is written around one string


def read_tests(public: str, private: str, metadata: str, max_bytes: int = MAX_BYTES) -> tuple[Test, ...]:
    """The public tests, then the private ones.

    Args:
        public: column `public_test_cases`, JSON.
        private: column `private_test_cases`: JSON, or base64 of zlib of a pickle of a text, which is JSON.
        metadata: column `metadata`, JSON; a `func_name` in it makes the tests calls of that function.
        max_bytes: size of the private tests, decompressed, beyond which they are refused.

    Raises:
        ValueError: a column cannot be read; names it.
    """
    if not private.lstrip().startswith("["):
        private = _in_column("private_test_cases", _unpacked, private, max_bytes)
    rows = [
        *_in_column("public_test_cases", _rows, public),
        *_in_column("private_test_cases", _rows, private),
    ]
    if not rows:
        raise ValueError("public_test_cases and private_test_cases are empty")
    described = _in_column("metadata", json.loads, metadata)
    name = described.get("func_name") if isinstance(described, dict) else None
    tests: list[Test] = []
    for number, row in enumerate(rows, 1):
        if name:
            tests.append(_in_column(f"test {number}", _call, name, row))
        else:
            tests.append(StdioTest(row["input"], row["output"]))
    return tuple(tests)


def _in_column(name: str, read: Any, *args: Any) -> Any:
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
            raise ValueError("expected tests with the texts 'input' and 'output'")
    return rows


def _call(name: str, row: dict[str, str]) -> CallTest:
    lines = row["input"].strip()
    args = tuple(json.loads(line) for line in lines.split("\n")) if lines else ()
    return CallTest(name, args, json.loads(row["output"]))


def _unpacked(private: str, max_bytes: int) -> str:
    stream = zlib.decompressobj()
    pickled = stream.decompress(base64.b64decode(private, validate=True), max_bytes + 1)
    if len(pickled) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes when decompressed")
    if not stream.eof:
        raise ValueError("the compressed data end too early")
    return _text_of(pickled)


def _text_of(pickled: bytes) -> str:
    """The text that a pickle holds. No unpickler runs: even one that finds no class can be made to fill memory."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in _STRINGS and not texts:
            texts.append(str(argument))
        elif opcode.name not in _AROUND:
            raise ValueError(f"the pickle must hold one text and nothing else, and it has {opcode.name}")
    if not texts:
        raise ValueError("the pickle holds no text")
    return texts[0]
