"""Files that are there whole or not at all, files of JSON lines, and D_revision, which is both."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdzero.manifests import sync
from sdzero.seals import sealed, unseal
from sdzero.types import Question, Trace

log = logging.getLogger(__name__)


def parse_rows(path: Path, raw: bytes) -> list[dict[str, Any]]:
    """Rows of a JSONL file.

    Raises:
        ValueError: a line is not a JSON object, or not the one that was sealed; names the file and the line.
    """
    rows = []
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(unseal(row) if isinstance(row, dict) else row)
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number} is damaged ({error}): remove the file to have it made again"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is no JSON object: remove the file to have it made again")
    return rows


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that grows by whole lines. A half-written last line is cut off, and said so.

    Raises:
        ValueError: another line is damaged.
    """
    raw = path.read_bytes()
    end = raw.rfind(b"\n") + 1
    if end < len(raw):
        log.warning("%s: dropped a half-written last line (%d bytes)", path, len(raw) - end)
        with path.open("r+b") as file:
            file.truncate(end)
    return parse_rows(path, raw[:end])


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Says which file could not be written: Python's own error of a full disk names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with written(path):
        partial.write_text(text)
        os.replace(partial, path)


def write_traces(path: Path, traces: Iterable[Trace]) -> None:
    """Writes D_revision whole or not at all, one sealed JSON object a line."""
    partial = path.with_name(f".{path.name}.partial")
    with written(path):
        with partial.open("w") as file:
            for trace in traces:
                file.write(sealed(dataclasses.asdict(trace)) + "\n")
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


def read_traces(path: Path) -> list[Trace]:
    """What `write_traces` wrote.

    Raises:
        ValueError: a line is damaged or lacks a field; names the file, the line and the field.
    """
    traces = []
    for number, row in enumerate(parse_rows(path, path.read_bytes()), 1):
        if missing := [f.name for f in dataclasses.fields(Trace) if f.name not in row]:
            raise ValueError(
                f"{path}: line {number} lacks {missing[0]!r}: it is no trace as `sdzero collect` writes them"
            )
        ids = {name: tuple(value) for name, value in row.items() if name.endswith("_ids")}
        traces.append(Trace(question=Question(**row["question"]), reward=row["reward"], **ids))
    return traces
