"""Sandbox backends, in the order in which they are tried."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec

from sdzero.graders.sandbox import seccomp
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

_PR_SET_DUMPABLE = 4
_READABLE = ("/usr", "/bin", "/lib", "/lib64", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


class Bubblewrap(Backend):
    """Unprivileged user, pid, network, ipc and mount namespaces. The default."""

    name = "bubblewrap"
    holds = True

    def missing(self) -> str | None:
        return self.find_program("bwrap", "apt install bubblewrap (Fedora: dnf install bubblewrap)")

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
        argv = [self.program, "--unshare-all", "--die-with-parent", "--new-session"]
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


class Nsjail(Backend):
    """The same namespaces as bubblewrap."""

    name = "nsjail"

    def missing(self) -> str | None:
        return self.find_program("nsjail", "build it from source or use a distribution that packages it")

    def command(self, job: Job) -> list[str]:
        argv = [self.program, "--mode", "o", "--log_fd", str(STATUS), "--hostname", "sandbox"]
        argv += ["--disable_proc", "--cwd", WORK, "--time_limit", "0", "--rlimit_nproc", "max"]
        argv += ["--rlimit_as", "max", "--rlimit_cpu", "max", "--rlimit_fsize", "max", "--rlimit_stack", "max"]
        argv += ["--rlimit_nofile", "max", "--iface_no_lo"]
        argv += ["--seccomp_string", policy] if (policy := seccomp.kafel_policy()) else []
        size = job.limits.files_mb * 2**20
        for name in ("usr", "bin", "lib", "lib64", "sbin"):
            if os.path.islink(f"/{name}"):
                argv += ["--symlink", f"{os.readlink(f'/{name}')}:/{name}"]
            elif os.path.isdir(f"/{name}"):
                argv += ["--bindmount_ro", f"/{name}"]
        argv += ["--mount", "none:/usr/local:tmpfs:size=4096"]
        argv += ["--mount", "none:/proc:proc:"]
        for device in ("null", "zero", "full", "random", "urandom"):
            argv += ["--bindmount", f"/dev/{device}"]
        argv += ["--mount", f"none:/tmp:tmpfs:size={size}"]
        argv += ["--bindmount", f"{job.folder}:{WORK}"] if job.folder else ["--mount", f"none:{WORK}:tmpfs:size={size}"]
        for here, there in job.binds:
            argv += ["--bindmount_ro", f"{here}:{there}"]
        for name, value in ENVIRONMENT.items():
            argv += ["--env", f"{name}={value}"]
        return [*argv, "--", *job.with_limits(self.counted, nproc=job.limits.processes)]

    def exit_code(self, status: bytes, code: int) -> int | None:
        if found := re.search(rb"exited with status: (\d+)", status):
            return int(found[1])
        if found := re.search(rb"terminated with signal: \S+ \((\d+)\)", status):
            return 128 + int(found[1])
        return None


class Sandlock(Backend):
    """Landlock and seccomp, for machines without user namespaces.

    Weaker than namespaces by design: programs keep the server's uid, so only Landlock's rules and scopes protect its
    files and processes, and files are written to a folder on disk.
    """

    name = "sandlock"
    mounts = False

    def missing(self) -> str | None:
        if not find_spec("sandlock"):
            return 'sandlock is not installed: pip install "sandlock>=0.9,<0.10"'
        import sandlock  # before the server drops root: its files may be unreadable afterwards

        if (has := sandlock.landlock_abi_version()) < (needs := sandlock.min_landlock_abi()):
            return f"sandlock needs Landlock ABI {needs} (Linux 6.12), but this kernel has {has}"
        return None

    def exit_code(self, status: bytes, code: int) -> int | None:
        return int(status) if status else None

    def execute(self, job: Job) -> None:
        from sandlock import Sandbox

        assert job.folder
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # sandlock reads its child's /proc, also without root
        box = Sandbox(
            fs_readable=[*filter(os.path.exists, _READABLE), *(here for here, _ in job.binds)],
            fs_writable=[job.folder, "/dev/null"],
            cwd=job.folder,
            max_processes=job.limits.processes,
            clean_env=True,
            env={**ENVIRONMENT, "HOME": job.folder, "TMPDIR": job.folder},
            no_coredump=True,
        )
        code = box.run_interactive(self.command(job))
        os.write(STATUS, str(code if code >= 0 else 128 - code).encode())
        os._exit(0)


class Unsafe(Backend):
    """No sandbox, only per-process limits: for programs you wrote yourself."""

    name = "unsafe"
    mounts = False

    def missing(self) -> str | None:
        return None

    def exit_code(self, status: bytes, code: int) -> int | None:
        return code

    def execute(self, job: Job) -> None:
        assert job.folder
        os.chdir(job.folder)
        argv = self.command(job)
        os.execve(argv[0], argv, {**ENVIRONMENT, "HOME": job.folder, "TMPDIR": job.folder})


SANDBOXES = (Bubblewrap, Nsjail, Sandlock)
BACKENDS = {backend.name: backend for backend in (*SANDBOXES, Unsafe)}
