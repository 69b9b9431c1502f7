"""Rows of JSON that carry their own checksum: a bit that flips inside a number leaves a row that still reads well."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

SEAL = "crc32"


def seal(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """The row with a checksum of its JSON as one more field."""
    return {**row, SEAL: _checksum(row)}


def unseal(row: dict[str, Any]) -> dict[str, Any]:
    """What `seal` was given. A row without a seal, of an older version or another writer, is returned as it is.

    Raises:
        ValueError: the row is not what was sealed.
    """
    inner = {name: value for name, value in row.items() if name != SEAL}
    if SEAL in row and row[SEAL] != _checksum(inner):
        raise ValueError(f"its {SEAL} is {_checksum(inner)} where it says {row[SEAL]}")
    return inner


def _checksum(row: Mapping[Any, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"
