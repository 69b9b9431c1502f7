"""Rows of JSON that carry their own checksum: a bit that flips inside a number leaves a row that still reads well."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

SEAL = "crc32"


def sealed(row: Mapping[Any, Any]) -> str:
    """The row as JSON without a line break, a checksum of it as one more field."""
    text = _text(row)  # made once: a journal gets a row for each step of an engine
    return f'{text[:-1]}{"," if row else ""}"{SEAL}":"{_checksum(text)}"}}'


def unseal(row: dict[str, Any]) -> dict[str, Any]:
    """What `sealed` was given, parsed. A row without a seal, of another writer, is returned as it is.

    Raises:
        ValueError: the row is not what was sealed.
    """
    inner = {name: value for name, value in row.items() if name != SEAL}
    if SEAL in row and row[SEAL] != (found := _checksum(_text(inner))):
        raise ValueError(f"its {SEAL} is {found} where it says {row[SEAL]}")
    return inner


def _text(row: Mapping[Any, Any]) -> str:
    return json.dumps(row, separators=(",", ":"))


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
