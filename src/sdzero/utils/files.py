"""Atomic writes, JSONL files with a checksum per row, and errors of a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sdzero.utils.row_checksum import verify_checksum

log = logging.getLogger(__name__)

PARTIAL = ".sdzero-partial"
"""Suffix of a file or folder that is being written or removed."""

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, as that of a failed write; make safetensors' error an OSError."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        number = next((n for n in FULL if f"(os error {n})" in str(error)), None)  # safetensors' wording
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def is_full(error: BaseException) -> bool:
    """Return whether the error says that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in FULL


@contextmanager
def atomic_write(path: Path, tag: str = "") -> Iterator[BinaryIO]:
    """File object whose content appears at `path` complete and durable, or not at all.

    The partial file lies in the same folder and is created exclusively, so a link planted under its name is replaced
    and never followed. A link at `path` itself is replaced too.

    Args:
        path: file to create or replace. One process at a time may write it, unless each passes a `tag` of its own.
        tag: makes the partial file's name unique.

    Raises:
        OSError: names `path`; its previous content is untouched.
    """
    partial = path.with_name(f"{path.name}{tag}{PARTIAL}")
    with add_path_to_errors(path):
        delete(partial)  # left by a killed write, or planted
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)  # otherwise a power cut may undo the replacement


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Folder to fill; it replaces `path` when the block ends, complete and durable, and vanishes if the block raises.

    A kill between the two renames of a replacement leaves neither folder at `path`. The next write removes what it
    left.

    Raises:
        OSError: names `path` unless it names another file.
    """
    partial, replaced = (path.with_name(f"{path.name}{tag}{PARTIAL}") for tag in ("", ".replaced"))
    with add_path_to_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        delete(partial)
        delete(replaced)
        partial.mkdir()
        try:
            yield partial
            for entry in (*partial.rglob("*"), partial):  # a folder's own entries too
                if not entry.is_symlink():
                    sync(entry)
            if path.exists() or path.is_symlink():
                os.replace(path, replaced)  # deleting a large folder takes long
            os.replace(partial, path)
        finally:
            delete(partial)
        sync(path.parent)
        delete(replaced)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete(path: Path) -> None:
    """Remove a file, a link or a folder with its content; do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_rows(path: Path, raw: bytes) -> list[dict[str, Any]]:
    """Parse the rows of a JSONL file and verify their checksums.

    Raises:
        ValueError: a line is not a JSON object, or its checksum is wrong; names the file and the line.
    """
    rows = []
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(verify_checksum(row) if isinstance(row, dict) else row)
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number} is damaged ({error}): remove the file to have it created again"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object: remove the file to have it created again")
    return rows


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file that grows by whole lines; drop an incomplete last line, with a warning.

    Raises:
        ValueError: another line is damaged.
    """
    raw = path.read_bytes()
    end = raw.rfind(b"\n") + 1
    if end < len(raw):
        log.warning("%s: dropped an incomplete last line (%d bytes)", path, len(raw) - end)
        with path.open("r+b") as file:
            file.truncate(end)
    return parse_rows(path, raw[:end])
