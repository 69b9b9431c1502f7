"""nsjail: the same namespaces as bubblewrap."""

from __future__ import annotations

import os
import re
import shutil

from sdzero.graders.sandbox import seccomp
from sdzero.graders.sandbox.backend import ENVIRONMENT, STATUS, WORK, Backend, Job


class Nsjail(Backend):
    name = "nsjail"
    _program: str | None = None

    def missing(self) -> str | None:
        self._program = shutil.which("nsjail")
        if not self._program:
            return "nsjail is not installed: build it from source or use a distribution that packages it"
        return None

    def command(self, job: Job) -> list[str]:
        argv = [self._program or "nsjail", "--mode", "o", "--log_fd", str(STATUS), "--hostname", "sandbox"]
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
