"""D_revision on disk: one trace per line, each with its checksum."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from sdzero.types import Question, Trace
from sdzero.utils.files import atomic_write, parse_rows
from sdzero.utils.row_checksum import dumps_with_checksum


def write_traces(path: Path, traces: Iterable[Trace]) -> None:
    """Write D_revision atomically, one JSON object per line."""
    with atomic_write(path) as file:
        for trace in traces:
            file.write(f"{dumps_with_checksum(dataclasses.asdict(trace))}\n".encode())


def read_traces(path: Path) -> list[Trace]:
    """Read a file of `write_traces`.

    Raises:
        ValueError: a line is damaged or lacks a field; names the file, the line and the field.
    """
    traces = []
    for number, row in enumerate(parse_rows(path, path.read_bytes()), 1):
        if missing := [f.name for f in dataclasses.fields(Trace) if f.name not in row]:
            raise ValueError(f"{path}: line {number} lacks {missing[0]!r}: it is not a trace of `sdzero collect`")
        ids = {name: tuple(value) for name, value in row.items() if name.endswith("_ids")}
        traces.append(Trace(question=Question(**row["question"]), reward=row["reward"], **ids))
    return traces
