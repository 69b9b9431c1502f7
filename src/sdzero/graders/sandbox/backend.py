"""What a sandbox is asked to run, and what every kind of sandbox must be able to say; backends/ has one a file."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from sdzero.graders.sandbox.types import Limits

STACK_MB = 256
NUM_FILES = 64  # open at one time
NUM_STACKS = 9  # address space for the main thread's stack and those of eight more threads, where no cgroup counts
STDIN, STDOUT, STDERR, STATUS, FILTER, HOLD = range(6)  # descriptors that a sandbox is started with
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/work", "TMPDIR": "/tmp"}
START_ENVIRONMENT = {"PATH": ENVIRONMENT["PATH"]}  # the sandbox's own
WORK = "/work"  # where programs begin
IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)  # by Python, and so by what it starts, unless they are reset


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

    def start(self, job: Job, descriptors: dict[int, int], enter: Callable[[int], None] | None) -> int:
        """Starts a job, and returns the sandbox's process.

        Here it is a fork, which enters its cgroup and only then becomes the sandbox. A sandbox that holds can be
        spawned, in a third of the time.

        Args:
            descriptors: number in the sandbox -> ours. The judge's own lie above all of these numbers.
            enter: puts a process in the run's cgroup, where there is one.
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
        except BaseException:  # noqa: BLE001 - nothing of it may go on here; the judge reports what it printed
            traceback.print_exc()
        finally:
            os._exit(126)

    def execute(self, job: Job) -> None:
        """Becomes the sandbox. Executor in a process of its own, whose descriptors are set."""
        argv = self.command(job)
        os.execve(argv[0], argv, START_ENVIRONMENT)
