"""Rows of JSON that carry their own checksum: a bit that flips inside a number leaves a row that still reads well."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

CHECKSUM_KEY = "crc32"


def dumps_with_checksum(row: Mapping[Any, Any]) -> str:
    """The row as JSON without a line break, a checksum of it as one more field."""
    text = _text(row)  # made once: a journal gets a row for each step of an engine
    return f'{text[:-1]}{"," if row else ""}"{CHECKSUM_KEY}":"{_checksum(text)}"}}'


def verify_checksum(row: dict[str, Any]) -> dict[str, Any]:
    """What `dumps_with_checksum` was given, parsed. A row without a seal, of another writer, is returned as it is.

    Raises:
        ValueError: the row is not what was dumps_with_checksum.
    """
    inner = {name: value for name, value in row.items() if name != CHECKSUM_KEY}
    if CHECKSUM_KEY in row and row[CHECKSUM_KEY] != (found := _checksum(_text(inner))):
        raise ValueError(f"its {CHECKSUM_KEY} is {found} where it says {row[CHECKSUM_KEY]}")
    return inner


def _text(row: Mapping[Any, Any]) -> str:
    return json.dumps(row, separators=(",", ":"))


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
