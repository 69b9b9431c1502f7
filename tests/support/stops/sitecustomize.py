"""Laid on PYTHONPATH by a test: a stage stands still at a chosen point for ever, so that the test can kill it there.

SDZERO_TEST_STOP is `replace=NAME` (right after a file whose name ends so was put in place) or `fsync=N` (right after
the N-th fsync of a stage). The process that stands still writes its id to SDZERO_TEST_STOPPED.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

_KIND, _, _WHAT = os.environ.get("SDZERO_TEST_STOP", "").partition("=")
_num_fsyncs = 0


def _stand_still() -> None:
    mark = Path(os.environ["SDZERO_TEST_STOPPED"])
    mark.with_suffix(".partial").write_text(str(os.getpid()))
    mark.with_suffix(".partial").rename(mark)
    while True:
        time.sleep(1)


def _replace(source: Any, target: Any) -> None:
    _os_replace(source, target)
    if str(target).endswith(_WHAT):
        _stand_still()


def _fsync(descriptor: int) -> None:
    global _num_fsyncs
    _os_fsync(descriptor)
    _num_fsyncs += 1
    if _num_fsyncs == int(_WHAT):
        _stand_still()


_os_replace, _os_fsync = os.replace, os.fsync
if _KIND == "replace":
    os.replace = _replace
elif _KIND == "fsync" and "SDZERO_STAGE" in os.environ:
    os.fsync = _fsync
