"""JSON rows with a checksum: a flipped bit in a number leaves a row that still parses."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

CHECKSUM_KEY = "crc32"


def dumps_with_checksum(row: Mapping[Any, Any]) -> str:
    """Encode a row as JSON on one line, with the CRC-32 of its text as one more field."""
    text = _dumps(row)  # once: a journal gets a row for each step of an engine
    return f'{text[:-1]}{"," if row else ""}"{CHECKSUM_KEY}":"{_crc32(text)}"}}'


def verify_checksum(row: dict[str, Any]) -> dict[str, Any]:
    """Return a parsed row without its checksum. A row that has none, from another writer, is returned as it is.

    Raises:
        ValueError: the row differs from the one that was encoded.
    """
    inner = {name: value for name, value in row.items() if name != CHECKSUM_KEY}
    if CHECKSUM_KEY in row and row[CHECKSUM_KEY] != (found := _crc32(_dumps(inner))):
        raise ValueError(f"its {CHECKSUM_KEY} is {found}, but the row records {row[CHECKSUM_KEY]}")
    return inner


def _dumps(row: Mapping[Any, Any]) -> str:
    return json.dumps(row, separators=(",", ":"))


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
