"""Interface of the sandbox backends, and the jobs they run."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from sdzero.graders.sandbox.types import Limits

STACK_MB = 256
NUM_FILES = 64  # open files
NUM_STACKS = 9  # without a cgroup: address space for the stacks of nine threads
STDIN, STDOUT, STDERR, STATUS, FILTER, HOLD = range(6)  # descriptors of a sandbox
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/work", "TMPDIR": "/tmp"}
START_ENVIRONMENT = {"PATH": ENVIRONMENT["PATH"]}  # of the sandbox itself
WORK = "/work"  # working directory of programs
IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)  # by Python and, unless reset, by its children


@dataclass(frozen=True)
class Job:
    """Program to run.

    Attributes:
        argv: command, in paths of the sandbox.
        limits: limits of the run.
        binds: (host path, sandbox path) of readable files, in addition to the system's programs.
        folder: host folder to mount writable at WORK, instead of an empty one in memory.
    """

    argv: tuple[str, ...]
    limits: Limits
    binds: tuple[tuple[str, str], ...] = ()
    folder: str | None = None

    def with_limits(self, counted: bool, **others: int) -> list[str]:
        """Return the command under `prlimit`.

        Args:
            counted: a cgroup limits the memory; else the address space of each process is limited.
            others: more limits of `prlimit`. `nproc` is per sandbox only inside a user namespace.
        """
        seconds = math.ceil(self.limits.time)  # the server checks the measured time
        limits: dict[str, Any] = {
            "cpu": f"{seconds}:{seconds + 1}",
            "fsize": self.limits.files_mb * 2**20,
            "nofile": NUM_FILES,
            "stack": STACK_MB * 2**20,
            **dict.fromkeys(("core", "memlock", "msgqueue"), 0),
            **others,
        }
        if not counted:
            limits["as"] = int(self.limits.memory_mb + NUM_STACKS * STACK_MB) * 2**20
        return ["/usr/bin/prlimit", *(f"--{name}={value}" for name, value in limits.items()), *self.argv]

    def in_host_paths(self) -> Job:
        """Return the job in host paths. What is bound into WORK is already in `folder`."""
        places = [(there, here) for here, there in self.binds if not there.startswith(f"{WORK}/")]
        places.append((WORK, self.folder or WORK))

        def place(argument: str) -> str:
            for there, here in places:
                if argument == there or argument.startswith(f"{there}/"):
                    return here + argument[len(there) :]
            return argument

        return dataclasses.replace(self, argv=tuple(map(place, self.argv)))


class Backend(ABC):
    """Sandbox from which a program cannot reach the host, and which no process outlives."""

    name: ClassVar[str]
    mounts: ClassVar[bool] = True  # has a file tree of its own; else `Job.folder` is always set
    holds: ClassVar[bool] = False  # waits for a byte on HOLD, so that the run joins its cgroup before it starts
    counted = False  # a cgroup limits the memory of runs; set once
    program = ""  # path of the sandbox's executable, set by `find_program`

    @abstractmethod
    def missing(self) -> str | None:
        """Return why the backend is unusable here, with the remedy; None if it is installed."""

    def find_program(self, name: str, remedy: str) -> str | None:
        """Find the executable; return the remedy if it is not installed."""
        self.program = shutil.which(name) or ""
        return None if self.program else f"{name} is not installed: {remedy}"

    def command(self, job: Job) -> list[str]:
        """Build the command that runs a job."""
        return job.in_host_paths().with_limits(self.counted)

    @abstractmethod
    def exit_code(self, status: bytes, code: int) -> int | None:
        """Return the program's exit code (128 + signal), or None without proof that it ran.

        Args:
            status: output of the sandbox to STATUS.
            code: exit code of the sandbox itself.
        """

    def child(self, status: bytes) -> int | None:
        """Return the host pid of the process that runs the program; None while unknown."""
        return None

    def start(self, job: Job, descriptors: dict[int, int], enter: Callable[[int], None] | None) -> int:
        """Start a job and return the pid of the sandbox.

        Forks, joins the cgroup and then executes the sandbox. A backend that `holds` can be spawned, which is faster.

        Args:
            descriptors: number in the sandbox -> descriptor of this process, all above HOLD.
            enter: puts a process into the run's cgroup, if there is one.
        """
        if pid := os.fork():
            return pid
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, *IGNORED):
                signal.signal(number, signal.SIG_DFL)
            if enter:
                enter(os.getpid())
            for number, ours in descriptors.items():
                os.dup2(ours, number)
            os.closerange(HOLD, 1 << 16)
            self.execute(job)
        except BaseException:  # noqa: BLE001 - this is the child; the server reports what it prints
            traceback.print_exc()
        finally:
            os._exit(126)

    def execute(self, job: Job) -> None:
        """Replace the forked process, whose descriptors are set, by the sandbox."""
        argv = self.command(job)
        os.execve(argv[0], argv, START_ENVIRONMENT)
