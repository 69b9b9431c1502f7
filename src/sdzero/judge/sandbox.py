"""What a sandbox is asked to run, and what every kind of sandbox must be able to say; backends/ has one a file."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from sdzero.judge.types import Limits

STACK_MB = 256
NUM_FILES = 64  # open at one time
NUM_STACKS = 9  # address space for the main thread's stack and those of eight more threads, where no cgroup counts
STDIN, STDOUT, STDERR, STATUS, FILTER, HOLD = range(6)  # descriptors that a sandbox is started with
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/work", "TMPDIR": "/tmp"}
WORK = "/work"  # where programs begin


@dataclass(frozen=True)
class Job:
    """One program to be run.

    Attributes:
        argv: the command, in the sandbox's own paths.
        limits: what it may use.
        binds: (path here, path in the sandbox) of what it may read besides the system's programs.
        folder: a folder of the judge that it may write at WORK, in place of an empty one in memory.
    """

    argv: tuple[str, ...]
    limits: Limits
    binds: tuple[tuple[str, str], ...] = ()
    folder: str | None = None

    def limited(self, counted: bool, **others: int) -> list[str]:
        """The command under `prlimit`.

        Args:
            counted: a cgroup counts its memory; else each process's address space is limited.
            others: more of `prlimit`'s names and values. `nproc` counts by sandbox only inside a user namespace.
        """
        seconds = math.ceil(self.limits.time)  # the judge holds the measured time to the limit
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

    def outside(self) -> Job:
        """The same for a sandbox that sees this machine's paths: what is bound into WORK is already in `folder`."""
        places = [(there, here) for here, there in self.binds if not there.startswith(f"{WORK}/")]
        places.append((WORK, self.folder or WORK))

        def place(argument: str) -> str:
            for there, here in places:
                if argument == there or argument.startswith(f"{there}/"):
                    return here + argument[len(there) :]
            return argument

        return dataclasses.replace(self, argv=tuple(map(place, self.argv)))


class Backend(ABC):
    """A kind of sandbox. Nothing of the host can be reached from it, and nothing outlives the run."""

    name: ClassVar[str]
    mounts: ClassVar[bool] = True  # shows programs a file tree of its own; else `Job.folder` is always given
    holds: ClassVar[bool] = False  # waits for a byte on HOLD, so that the run can be put in its cgroup before it begins
    counted = False  # set once: a cgroup counts the memory of its runs

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot be used here, with the remedy; None where its parts are there."""

    @abstractmethod
    def command(self, job: Job) -> list[str]:
        """The command that runs a job, with descriptors as numbered above."""

    @abstractmethod
    def exit_code(self, status: bytes, code: int) -> int | None:
        """The program's exit code (128 + signal) where the sandbox proves that it ran; else None.

        Args:
            status: what the sandbox wrote to STATUS.
            code: the sandbox's own exit code.
        """

    def child(self, status: bytes) -> int | None:
        """The process, as this machine numbers it, under which the program runs; None while it isn't known."""
        return None

    def spawn(self, job: Job, descriptors: dict[int, int]) -> int:
        """Starts a sandbox that holds. `descriptors`: its number -> ours. Returns its process."""
        argv, moves = self.command(job), [(os.POSIX_SPAWN_DUP2, ours, its) for its, ours in descriptors.items()]
        environment, reset = {"PATH": ENVIRONMENT["PATH"]}, (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them
        return os.posix_spawn(argv[0], argv, environment, file_actions=moves, setsid=True, setsigdef=reset)

    def execute(self, job: Job) -> None:
        """Becomes the sandbox. Runs in a process of its own, whose descriptors are set."""
        argv = self.command(job)
        os.execve(argv[0], argv, {"PATH": ENVIRONMENT["PATH"]})
