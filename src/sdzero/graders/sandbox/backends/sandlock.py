"""sandlock: Landlock and seccomp, for machines without user namespaces.

Weaker than namespaces by design: programs keep the server's uid, so only Landlock's rules and scopes protect its files
and processes, and files are written to a folder on disk.
"""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec

from sdzero.graders.sandbox.backend import ENVIRONMENT, STATUS, Backend, Job

_PR_SET_DUMPABLE = 4
_READABLE = ("/usr", "/bin", "/lib", "/lib64", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


class Sandlock(Backend):
    name = "sandlock"
    mounts = False

    def missing(self) -> str | None:
        if not find_spec("sandlock"):
            return 'sandlock is not installed: pip install "sandlock>=0.9,<0.10"'
        import sandlock  # before the server drops root: its files may be unreadable afterwards

        if (has := sandlock.landlock_abi_version()) < (needs := sandlock.min_landlock_abi()):
            return f"sandlock needs Landlock ABI {needs} (Linux 6.12), but this kernel has {has}"
        return None

    def command(self, job: Job) -> list[str]:
        return job.in_host_paths().with_limits(self.counted)

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
