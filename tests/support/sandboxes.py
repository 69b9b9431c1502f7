"""Whether this machine has a sandbox for the judge."""

from __future__ import annotations

import os
from functools import cache

from sdzero.graders.sandbox.client import Judge
from sdzero.graders.sandbox.types import JudgeError


@cache
def lacks_sandbox() -> bool:
    """Whether tests that run programs are to be left out. A machine that must have a sandbox fails them instead."""
    if "sandbox" in os.environ.get("SDZERO_TEST_REQUIRE", "").split(","):
        return False
    try:
        Judge(num_workers=1).close()
    except (JudgeError, ValueError):
        return True
    return False
