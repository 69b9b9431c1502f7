"""Whether this machine has a sandbox for the judge."""

from __future__ import annotations

import os
from functools import cache

from sdzero.graders.errors import GraderError
from sdzero.graders.sandbox.client import SandboxClient


@cache
def lacks_sandbox() -> bool:
    """Whether tests that run programs are to be left out. A machine that must have a sandbox fails them instead."""
    if "sandbox" in os.environ.get("SDZERO_TEST_REQUIRE", "").split(","):
        return False
    try:
        SandboxClient(num_workers=1).close()
    except (GraderError, ValueError):
        return True
    return False
