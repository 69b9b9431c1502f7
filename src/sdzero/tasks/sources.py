"""Where rows come from: a file, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sdzero.tasks.files import PACKAGE, Row, package_file, read_rows
from sdzero.tasks.hub import HubDataset, read_hub


def read(source: str | HubDataset, columns: Sequence[str], keep: Callable[[Row], bool] | None = None) -> list[Row]:
    """The rows of a source in order. `columns` are those that must be among its columns; `keep` says which rows are
    wanted, where all of them would be too many to be held.

    Raises:
        FileNotFoundError: there is no such file, or the data set cannot be had; one line that says why.
        ValueError: it is no table, or lacks a column; names it, and what was found.
    """
    if isinstance(source, HubDataset):
        rows = read_hub(source, columns, keep)
    else:
        rows = read_rows(package_file(source) if source.startswith(PACKAGE) else Path(source))
    found = sorted({column for row in rows for column in row})
    missing = [column for column in columns if column not in found]
    if missing and (rows or keep is None):
        raise ValueError(f"{source} has no column {missing[0]!r}; it has {found}")
    return rows if keep is None else [row for row in rows if keep(row)]
