"""What the judge's process and its clients say to each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

LENGTH = 8  # bytes before each message: its length, big-endian
ALIVE_SECONDS = 5.0  # between the empty messages that say that the judge is there
SILENCE_SECONDS = 60.0  # after which it hangs


@dataclass(frozen=True)
class ServerOptions:
    """`backend` by name, or `auto`; `num_workers` runs at a time; `python` is the interpreter in the sandbox;
    `cgroups` says whether to look for one that counts memory."""

    backend: str
    num_workers: int
    python: str
    cgroups: bool


@dataclass(frozen=True)
class Handshake:
    """What the judge found: the sandbox's name, why each one before it would not do, and its cgroup's folder."""

    backend: str | None
    refused: list[str]
    cgroup: str | None


def frame(message: Any) -> bytes:
    """A message as JSON, its length before it."""
    data = json.dumps(message).encode()
    return len(data).to_bytes(LENGTH, "big") + data
