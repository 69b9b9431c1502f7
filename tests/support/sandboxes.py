"""Detection of a code sandbox on this machine."""

from __future__ import annotations

import os
from functools import cache

from sdzero.graders.errors import GraderError
from sdzero.graders.sandbox.client import SandboxClient


@cache
def lacks_sandbox() -> bool:
    """Check if tests that run programs must be skipped. They fail instead where SDZERO_TEST_REQUIRE names `sandbox`."""
    if "sandbox" in os.environ.get("SDZERO_TEST_REQUIRE", "").split(","):
        return False
    try:
        SandboxClient(num_workers=1).close()
    except (GraderError, ValueError):
        return True
    return False
