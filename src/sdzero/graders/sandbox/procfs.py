"""What the kernel says of a process that runs: its children, its CPU time, its memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from tree(int(child))
    except OSError:
        return  # it has ended meanwhile


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of the children that it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:  # it has ended meanwhile
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    """Memory that is no file's, in MiB; a page that processes share counts for each of them."""
    try:
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return sum(int(rows[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024
    except (OSError, KeyError):  # it has ended meanwhile
        return 0.0
