"""Resources of runs: a semaphore over their number and memory, /proc, and cgroups where this machine delegates one.

Supports cgroup v2 (`memory.max`) and v1 (`memory.limit_in_bytes`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

_V1 = {"limit": "memory.limit_in_bytes", "peak": "memory.max_usage_in_bytes", "events": "memory.oom_control"}
_V2 = {"limit": "memory.max", "peak": "memory.peak", "events": "memory.events"}


class ResourceSemaphore:
    """Bound on concurrent runs and on the sum of their memory limits.

    Args:
        max_runs: maximum number of concurrent runs.
        memory_mb: maximum sum of their limits, in MiB. A single run may exceed it.
    """

    def __init__(self, max_runs: int, memory_mb: float) -> None:
        self.max_runs, self.memory_mb = max_runs, memory_mb
        self._num_runs, self._reserved = 0, 0.0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def acquire(self, memory_mb: float) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(memory_mb))
            self._num_runs, self._reserved = self._num_runs + 1, self._reserved + memory_mb
        try:
            yield
        finally:
            async with self._changed:
                self._num_runs, self._reserved = self._num_runs - 1, self._reserved - memory_mb
                self._changed.notify_all()

    def _fits(self, memory_mb: float) -> bool:
        return not self._num_runs or (self._num_runs < self.max_runs and self._reserved + memory_mb <= self.memory_mb)


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


@dataclass
class Cgroup:
    """Cgroup of one run."""

    path: Path
    files: dict[str, str]

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def processes(self) -> list[int]:
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def peak_mb(self) -> float:
        """Return the peak memory of the run in MiB; 0 if the kernel does not record it."""
        try:
            return int((self.path / self.files["peak"]).read_text()) / 2**20
        except FileNotFoundError:
            return 0.0

    def out_of_memory(self) -> bool:
        """Check if the kernel killed a process for exceeding the limit."""
        lines = (self.path / self.files["events"]).read_text().splitlines()
        return any(int(value) > 0 for name, value in map(str.split, lines) if name == "oom_kill")

    def remove(self) -> None:
        for _ in range(200):  # the exit of the last process may not be accounted for yet
            try:
                return self.path.rmdir()
            except OSError:
                time.sleep(0.001)


class Cgroups:
    """Cgroup of this process, with a child cgroup for each run."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder, self.files = folder, files
        self._number = count()

    @classmethod
    def delegate(
        cls, uid: int, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
    ) -> Cgroups | None:
        """Create a cgroup that `uid` may subdivide; None where this machine does not allow it.

        Call it before dropping root: under v2 the calling process moves into the cgroup.
        """
        places = dict(line.split(":", 2)[1:] for line in own.read_text().splitlines())
        try:
            if "memory" in places:
                folder = root / "memory" / places["memory"].lstrip("/") / f"sdzero-sandbox-{os.getpid()}"
                return cls._create(folder, uid, _V1)
            for parent in (own_cgroup := root / places[""].lstrip("/"), *own_cgroup.parents):
                control = parent / "cgroup.subtree_control"
                if root in (parent, *parent.parents) and control.exists() and "memory" in control.read_text().split():
                    created = cls._create(parent / f"sdzero-sandbox-{os.getpid()}", uid, _V2)
                    server = created.folder / "server"  # a cgroup that has children may hold no processes itself
                    server.mkdir()
                    (server / "cgroup.procs").write_text(str(os.getpid()))
                    (created.folder / "cgroup.subtree_control").write_text("+memory")
                    return created
        except (OSError, KeyError):
            return None
        return None

    @classmethod
    def _create(cls, folder: Path, uid: int, files: dict[str, str]) -> Cgroups:
        folder.mkdir()
        for path in (folder, *(folder / name for name in ("cgroup.procs", "cgroup.subtree_control"))):
            if path.exists():
                os.chown(path, uid, -1)
        return cls(folder, files)

    def new(self, memory_mb: float) -> Cgroup:
        group = Cgroup(self.folder / f"run-{next(self._number)}", self.files)
        group.path.mkdir()
        (group.path / self.files["limit"]).write_text(str(int(memory_mb * 2**20)))
        for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1"), ("memory.swappiness", "0")):
            if (group.path / name).exists():
                (group.path / name).write_text(value)
        return group
