"""CPU time, memory and descendants of running processes, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def process_tree(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    try:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from process_tree(int(child))
    except OSError:
        return  # it has ended


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of the children it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:  # it has ended
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    """Return the anonymous and shared memory of a process in MiB; a shared page counts for each process."""
    try:
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return sum(int(rows[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024
    except (OSError, KeyError):  # it has ended
        return 0.0
