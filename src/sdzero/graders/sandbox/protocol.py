"""Messages between the sandbox server and its clients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

LENGTH = 8  # bytes of the big-endian length before each message
HEARTBEAT_SECONDS = 2.0  # between empty messages while a client waits
SILENCE_SECONDS = 60.0  # without a message: the server hangs


@dataclass(frozen=True)
class ServerOptions:
    """Options of `SandboxClient` that the server needs."""

    backend: str
    num_workers: int
    python: str
    cgroups: bool


@dataclass(frozen=True)
class Handshake:
    """Result of the server's start: the sandbox (None: none is safe), why others were rejected, the cgroup's folder."""

    backend: str | None
    rejected: list[str]
    cgroup: str | None


def frame(message: Any) -> bytes:
    """Encode a message as JSON after its length."""
    data = json.dumps(message).encode()
    return len(data).to_bytes(LENGTH, "big") + data
