"""A disk that is full: an error that says where, whichever library was writing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def add_path_to_errors(folder: Path) -> Iterator[None]:
    """Around work that writes into `folder`: a failed write does not say itself which file it was.

    Raises: the OSError, with the folder as its file name unless it has one.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(folder)
        raise
    except Exception as error:
        number = next((n for n in FULL if f"(os error {n})" in str(error)), None)  # safetensors' way of saying it
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FULL
