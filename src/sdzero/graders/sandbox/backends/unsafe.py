"""No sandbox, only per-process limits: for programs you wrote yourself."""

from __future__ import annotations

import os

from sdzero.graders.sandbox.backend import ENVIRONMENT, Backend, Job


class Unsafe(Backend):
    name = "unsafe"
    mounts = False

    def missing(self) -> str | None:
        return None

    def command(self, job: Job) -> list[str]:
        return job.in_host_paths().with_limits(self.counted)

    def exit_code(self, status: bytes, code: int) -> int | None:
        return code

    def execute(self, job: Job) -> None:
        assert job.folder
        os.chdir(job.folder)
        argv = self.command(job)
        os.execve(argv[0], argv, {**ENVIRONMENT, "HOME": job.folder, "TMPDIR": job.folder})
