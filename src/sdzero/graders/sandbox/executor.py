"""Executor programs in a sandbox: starts, feeds, watches, ends and reaps them, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import fcntl
import os
import resource
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdzero.graders.sandbox import seccomp
from sdzero.graders.sandbox.backend import FILTER, HOLD, STATUS, STDERR, STDIN, STDOUT, WORK, Backend, Job
from sdzero.graders.sandbox.cgroups import Cgroup, Cgroups
from sdzero.graders.sandbox.procfs import cpu_seconds, memory_mb, tree
from sdzero.graders.sandbox.semaphore import ResourceSemaphore

KEPT = 2048  # bytes of standard error that are kept
_CHUNK = 1 << 16
_WATCH_SECONDS = 0.02  # between looks at the processes of a run
_SLACK_SECONDS = 0.2  # beyond its limit, before a run is ended: the verdict holds it to the limit itself
_LOOK_SECONDS = 0.005  # between looks at what is left of a run
_REMAINS_SECONDS = 20.0  # that the remains of a run may take to go
_PR_SET_CHILD_SUBREAPER = 36

Stop = Literal["timeout", "memory", "output_limit"]


class SandboxFailure(RuntimeError):
    """The sandbox did not prove that the program ran."""


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        code: the program's exit code, 128 + signal where one ended it; -1 where the judge did.
        stopped: why the judge or the kernel ended it, if they did.
    """

    code: int
    stopped: Stop | None
    cpu_seconds: float
    wall_seconds: float
    memory_mb: float
    stdout: bytes
    stderr: bytes


@dataclass
class _Run:
    """One run under way."""

    pid: int
    job: Job
    group: Cgroup | None
    hold: int | None  # what a sandbox that waits for its cgroup reads from
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # the sandbox's own process is gone
    code: int = 0  # the sandbox's own
    stopped: Stop | None = None
    num_bytes: int = 0
    cpu_seconds: float = 0.0  # of all its processes, when they were last looked at
    status: bytearray = field(default_factory=bytearray)
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)

    def stop(self, why: Stop) -> None:
        if not self.ended.is_set():
            self.stopped = self.stopped or why
            os.kill(self.pid, signal.SIGKILL)  # all that it holds ends with it


def sealed(data: bytes) -> int:
    """A descriptor that reads `data` from the start, and through which nobody can write."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class Executor:
    """Starts runs, within an asyncio loop. Its process becomes the reaper of all that they leave behind.

    Args:
        backend: the kind of sandbox.
        slots: how many runs may be under way.
        cgroups: counts the memory of each run; None watches it instead, and limits address spaces.
        folder: where sandboxes that share this machine's file tree get their folder.
    """

    def __init__(self, backend: Backend, slots: ResourceSemaphore, cgroups: Cgroups | None, folder: Path) -> None:
        self.backend, self.slots, self.cgroups, self.folder = backend, slots, cgroups, folder
        backend.counted = cgroups is not None
        self._filter = seccomp.program()
        self._reaped = asyncio.Event()
        self._runs: dict[int, _Run] = {}
        self._gone: dict[int, resource.struct_rusage] = {}
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    async def run(self, job: Job, stdin: bytes = b"") -> Outcome:
        """One run, to its end.

        Raises:
            SandboxFailure: the sandbox did not prove that the program ran, or its remains would not go.
        """
        async with self.slots.take(job.limits.memory_mb):
            return await self._within(job, stdin)

    async def _within(self, job: Job, stdin: bytes) -> Outcome:
        made = None
        if not self.backend.mounts:
            job, made = self._in_folder(job)
        group = self.cgroups.new(job.limits.memory_mb) if self.cgroups else None
        source = sealed(stdin)
        try:
            return await self._run(job, source, group)
        finally:
            os.close(source)
            if group:
                group.remove()
            if made:
                shutil.rmtree(made)

    def _in_folder(self, job: Job) -> tuple[Job, str | None]:
        made = None if job.folder else tempfile.mkdtemp(dir=self.folder)
        job = dataclasses.replace(job, folder=job.folder or made)
        for here, there in job.binds:
            if there.startswith(f"{WORK}/"):
                shutil.copy(here, f"{job.folder}{there[len(WORK) :]}")
        return job, made

    async def _run(self, job: Job, stdin: int, group: Cgroup | None) -> Outcome:
        loop, started = asyncio.get_running_loop(), time.monotonic()
        run, pipes = self._start(job, stdin, group)
        try:
            timer = loop.call_later(job.limits.wall_seconds, run.stop, "timeout")
            watch = loop.create_task(self._watch(run))
            await self._end(run)
            wall = time.monotonic() - started
            timer.cancel()
            await watch
            for descriptor, kept in pipes.items():  # what is left, not their end: a stray process may hold them open
                while self._read(run, descriptor, kept):
                    pass
        finally:
            for descriptor in pipes:
                loop.remove_reader(descriptor)
                os.close(descriptor)
            if run.hold is not None:
                os.close(run.hold)
        usage = await self._settle(run)
        stopped = "memory" if group and group.ran_out() else run.stopped
        code = -1 if stopped else self.backend.exit_code(bytes(run.status), run.code)
        if code is None:
            raise SandboxFailure(
                f"{self.backend.name}: {bytes(run.stderr).decode(errors='replace').strip() or 'no exit code'}"
            )
        cpu = max(run.cpu_seconds, usage.ru_utime + usage.ru_stime)
        memory = (group.peak_mb() if group else 0.0) or usage.ru_maxrss / 1024
        return Outcome(code, stopped, cpu, wall, memory, bytes(run.stdout), bytes(run.stderr))

    async def _end(self, run: _Run) -> None:
        try:
            await run.ended.wait()
        except asyncio.CancelledError:  # nobody asks for it any more
            run.stop("timeout")
            await run.ended.wait()
            await self._settle(run)
            raise

    def _start(self, job: Job, stdin: int, group: Cgroup | None) -> tuple[_Run, dict[int, bytearray]]:
        pairs = {number: os.pipe() for number in (STDOUT, STDERR, STATUS)}
        theirs = {STDIN: stdin, FILTER: sealed(self._filter), **{number: pair[1] for number, pair in pairs.items()}}
        hold = None
        if self.backend.holds:
            theirs[HOLD], hold = os.pipe()
        try:
            pid = self.backend.start(job, theirs, group.add if group else None)
        except OSError as error:  # the sandbox's program is gone, or out of this user's reach
            for descriptor in {hold, *(ours for ours, _ in pairs.values())} - {None}:
                os.close(descriptor)
            raise SandboxFailure(f"{self.backend.name}: {error}") from error
        finally:
            for descriptor in {*theirs.values()} - {stdin}:
                os.close(descriptor)
        run = self._runs[pid] = _Run(pid, job, group, hold)
        pipes = {pairs[STDOUT][0]: run.stdout, pairs[STDERR][0]: run.stderr, pairs[STATUS][0]: run.status}
        for descriptor, kept in pipes.items():
            os.set_blocking(descriptor, False)
            asyncio.get_running_loop().add_reader(descriptor, self._read, run, descriptor, kept)
        return run, pipes

    def _release(self, run: _Run) -> None:
        """Lets a sandbox that holds begin, once it is known which process of its is to be counted."""
        child = self.backend.child(bytes(run.status))
        if child is not None and run.hold is not None:
            self._gone.pop(child, None)  # it waits for the byte: who had its number before is somebody else
            with suppress(ProcessLookupError):
                if run.group:
                    run.group.add(child)
            os.write(run.hold, b"1")
            os.close(run.hold)
            run.hold = None

    # --- while it runs --------------------------------------------------------------------------

    def _read(self, run: _Run, descriptor: int, kept: bytearray) -> bool:
        """Takes what a pipe holds. Returns whether there may be more."""
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(descriptor)
            return False
        kept += data[: max(KEPT - len(kept), 0)] if kept is run.stderr else data
        if kept is run.status:
            self._release(run)
            return True
        run.num_bytes += len(data)
        if run.num_bytes > run.job.limits.output_mb * 2**20:
            run.stop("output_limit")
            run.stopped = run.stopped or "output_limit"  # found in what was left
            return False
        return True

    async def _watch(self, run: _Run) -> None:
        """Holds all processes of a run together to its CPU time, and to its memory where no cgroup does.

        What the kernel reports at the end leaves out children that nobody has waited for.
        """
        limits = run.job.limits
        while not run.ended.is_set():
            processes = [*tree(run.pid)]
            run.cpu_seconds = max(run.cpu_seconds, sum(map(cpu_seconds, processes)))
            if run.cpu_seconds > limits.time + _SLACK_SECONDS:
                run.stop("timeout")
            if not run.group and sum(map(memory_mb, processes)) > limits.memory_mb:
                run.stop("memory")
            with suppress(TimeoutError):
                await asyncio.wait_for(run.ended.wait(), _WATCH_SECONDS)

    def _reap(self) -> None:
        """Every child that has ended, and every orphan that became ours."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._gone[pid] = usage
            self._reaped.set()
            if run := self._runs.get(pid):
                run.code = os.waitstatus_to_exitcode(status)
                run.ended.set()

    # --- its end --------------------------------------------------------------------------------

    async def _settle(self, run: _Run) -> resource.struct_rusage:
        """Waits until nothing of a run is left. Returns what its processes used, the sandbox's own left out."""
        inner = self.backend.child(bytes(run.status))
        deadline = time.monotonic() + _REMAINS_SECONDS
        while left := self._left(run, inner):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise SandboxFailure(f"the remains of a run would not go within {_REMAINS_SECONDS:.0f} s")
            self._reaped.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reaped.wait(), _LOOK_SECONDS)
        del self._runs[run.pid]
        own = self._gone.pop(run.pid)
        usage = self._gone.pop(inner) if inner else own
        if not self._runs:
            self._gone.clear()  # orphans that nobody asks for
        return usage

    def _left(self, run: _Run, inner: int | None) -> set[int]:
        left = {*run.group.processes()} if run.group else set()
        return left | {inner} if inner and inner not in self._gone else left
