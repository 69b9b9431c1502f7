"""bubblewrap: unprivileged user, pid, network, ipc and mount namespaces. The default."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cached_property

from sdzero.graders.sandbox.backend import (
    ENVIRONMENT,
    FILTER,
    HOLD,
    IGNORED,
    START_ENVIRONMENT,
    STATUS,
    WORK,
    Backend,
    Job,
)


class Bubblewrap(Backend):
    name = "bubblewrap"
    holds = True
    _program: str | None = None

    def missing(self) -> str | None:
        self._program = shutil.which("bwrap")
        if not self._program:
            return "bwrap is not installed: apt install bubblewrap (Fedora: dnf install bubblewrap)"
        return None

    @cached_property
    def _root(self) -> list[str]:
        """Mount options for the system's programs and libraries, without /usr/local, /etc and /home."""
        mounts = ["--ro-bind", "/usr", "/usr", "--size", "4096", "--tmpfs", "/usr/local", "--remount-ro", "/usr/local"]
        for name in ("bin", "lib", "lib64", "sbin"):
            if os.path.islink(f"/{name}"):
                mounts += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
            elif os.path.isdir(f"/{name}"):
                mounts += ["--ro-bind", f"/{name}", f"/{name}"]
        return mounts

    def command(self, job: Job) -> list[str]:
        size = str(job.limits.files_mb * 2**20)
        argv = [self._program or "bwrap", "--unshare-all", "--die-with-parent", "--new-session"]
        argv += ["--json-status-fd", str(STATUS), "--seccomp", str(FILTER), "--block-fd", str(HOLD)]
        argv += ["--cap-drop", "ALL", "--clearenv", *self._root, "--proc", "/proc", "--dev", "/dev"]
        argv += ["--size", "1048576", "--tmpfs", "/dev/shm", "--size", size, "--tmpfs", "/tmp"]
        argv += ["--bind", job.folder, WORK] if job.folder else ["--size", size, "--tmpfs", WORK]
        for here, there in job.binds:
            argv += ["--ro-bind", here, there]
        argv += ["--remount-ro", "/", "--remount-ro", "/dev", "--chdir", WORK]
        for name, value in ENVIRONMENT.items():
            argv += ["--setenv", name, value]
        return [*argv, "--", *job.with_limits(self.counted, nproc=job.limits.processes)]

    def start(self, job: Job, descriptors: dict[int, int], enter: Callable[[int], None] | None) -> int:
        argv, moves = self.command(job), [(os.POSIX_SPAWN_DUP2, ours, its) for its, ours in descriptors.items()]
        return os.posix_spawn(argv[0], argv, START_ENVIRONMENT, file_actions=moves, setsid=True, setsigdef=IGNORED)

    def child(self, status: bytes) -> int | None:
        return _value(status, "child-pid")

    def exit_code(self, status: bytes, code: int) -> int | None:
        return _value(status, "exit-code")


def _value(status: bytes, key: str) -> int | None:
    """Find a key in bubblewrap's status, one JSON object per line; the last line may be incomplete."""
    for line in status.splitlines():
        try:
            if key in (row := json.loads(line)):
                return row[key]
        except ValueError:
            continue
    return None
