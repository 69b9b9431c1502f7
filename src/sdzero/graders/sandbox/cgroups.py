"""Memory limit over all processes of a run by a cgroup, where this machine delegates one.

Supports cgroup v2 (`memory.max`) and v1 (`memory.limit_in_bytes`).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

_V1 = {"limit": "memory.limit_in_bytes", "peak": "memory.max_usage_in_bytes", "events": "memory.oom_control"}
_V2 = {"limit": "memory.max", "peak": "memory.peak", "events": "memory.events"}


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
