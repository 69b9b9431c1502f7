"""Errors of a full disk, whichever library was writing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
