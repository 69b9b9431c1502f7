"""Memory of all processes of one run together, limited by the kernel, where a part of its tree is ours to divide.

Both of Linux's interfaces: version 2 (`memory.max`) and version 1 (`memory.limit_in_bytes`).
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
    """One run's group."""

    path: Path
    files: dict[str, str]

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def processes(self) -> list[int]:
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def peak_mb(self) -> float:
        """Most memory that the run has had, in MiB; 0 where the kernel keeps no such figure."""
        try:
            return int((self.path / self.files["peak"]).read_text()) / 2**20
        except FileNotFoundError:
            return 0.0

    def ran_out(self) -> bool:
        """Whether the kernel killed a process for its memory."""
        lines = (self.path / self.files["events"]).read_text().splitlines()
        return any(int(value) > 0 for name, value in map(str.split, lines) if name == "oom_kill")

    def remove(self) -> None:
        for _ in range(200):  # the last process's exit may not have been accounted yet
            try:
                return self.path.rmdir()
            except OSError:
                time.sleep(0.001)


class Cgroups:
    """A folder of the cgroup tree, made for this process, with one folder for each run."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder, self.files = folder, files
        self._number = count()

    @classmethod
    def delegated(
        cls, uid: int, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
    ) -> Cgroups | None:
        """A folder that `uid` may divide from now on; None where this machine lets us make none.

        Call it before dropping from root: under version 2 the calling process moves into the folder.
        """
        places = dict(line.split(":", 2)[1:] for line in own.read_text().splitlines())
        try:
            if "memory" in places:
                folder = root / "memory" / places["memory"].lstrip("/") / f"sdzero-judge-{os.getpid()}"
                return cls._made(folder, uid, _V1)
            for parent in (above := root / places[""].lstrip("/"), *above.parents):
                shares = parent / "cgroup.subtree_control"
                if root in (parent, *parent.parents) and shares.exists() and "memory" in shares.read_text().split():
                    made = cls._made(parent / f"sdzero-judge-{os.getpid()}", uid, _V2)
                    server = made.folder / "server"  # a cgroup that has children may hold no processes itself
                    server.mkdir()
                    (server / "cgroup.procs").write_text(str(os.getpid()))
                    (made.folder / "cgroup.subtree_control").write_text("+memory")
                    return made
        except (OSError, KeyError):
            return None
        return None

    @classmethod
    def _made(cls, folder: Path, uid: int, files: dict[str, str]) -> Cgroups:
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
