"""Detection of a code sandbox on this machine, and of its processes."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

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


def command_line(pid: int | str) -> bytes:
    """Return the command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def server_pid(client: SandboxClient) -> int:
    """Return the process of the server that a client started."""
    assert client._connection.process, "the client shares a server that another process started"
    return client._connection.process.pid
