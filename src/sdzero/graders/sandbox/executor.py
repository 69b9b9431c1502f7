"""Execution of programs in a sandbox: start, feed, watch, stop and reap, without leaving anything behind."""

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
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdzero.graders.sandbox import seccomp
from sdzero.graders.sandbox.backend import FILTER, HOLD, STATUS, STDERR, STDIN, STDOUT, WORK, Backend, Job
from sdzero.graders.sandbox.resources import Cgroup, Cgroups, ResourceSemaphore, cpu_seconds, memory_mb, process_tree

KEPT = 2048  # bytes of standard error
_CHUNK = 1 << 16
_WATCH_SECONDS = 0.02  # between polls of the processes of a run
_SLACK_SECONDS = 0.2  # CPU time beyond the limit before a run is stopped; the verdict uses the limit itself
_SETTLE_POLL_SECONDS = 0.005  # between polls of the remaining processes of a run
_SETTLE_SECONDS = 20.0  # until all processes of a run are gone
_PR_SET_CHILD_SUBREAPER = 36

Stop = Literal["timeout", "memory", "output_limit"]


class SandboxFailure(RuntimeError):
    """The sandbox did not prove that the program ran."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    Attributes:
        code: exit code of the program, 128 + signal if a signal ended it, -1 if it was stopped.
        stopped: reason if the executor or the kernel's memory limit stopped it.
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
    """Run in progress."""

    pid: int
    job: Job
    group: Cgroup | None
    hold: int | None  # pipe to a sandbox that waits until it is in its cgroup
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # the sandbox's process has ended
    code: int = 0  # exit code of the sandbox itself
    stopped: Stop | None = None
    num_bytes: int = 0
    cpu_seconds: float = 0.0  # of all its processes, at the last poll
    status: bytearray = field(default_factory=bytearray)
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)

    def stop(self, why: Stop) -> None:
        if not self.ended.is_set():
            self.stopped = self.stopped or why
            os.kill(self.pid, signal.SIGKILL)  # ends everything inside


def sealed_memfd(data: bytes) -> int:
    """Return a descriptor that reads `data` and that no process can write to."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class Executor:
    """Runs jobs within an asyncio loop. Its process reaps all orphans that they leave.

    Without cgroups, memory is polled and address spaces are limited. `folder` holds the working folders of sandboxes
    without a file tree of their own.
    """

    def __init__(self, backend: Backend, semaphore: ResourceSemaphore, cgroups: Cgroups | None, folder: Path) -> None:
        self.backend, self.semaphore, self.cgroups, self.folder = backend, semaphore, cgroups, folder
        backend.counted = cgroups is not None
        self._filter = seccomp.bpf_program()
        self._child_reaped = asyncio.Event()
        self._runs: dict[int, _Run] = {}
        self._reaped_usage: dict[int, resource.struct_rusage] = {}
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    async def run(self, job: Job, stdin: bytes = b"") -> Outcome:
        """Run a job to its end.

        Raises:
            SandboxFailure: the sandbox did not prove that the program ran, or its processes could not be killed.
        """
        async with self.semaphore.acquire(job.limits.memory_mb):
            with ExitStack() as cleanup:
                if not self.backend.mounts:
                    job = self._in_host_folder(job, cleanup)
                group = self.cgroups.new(job.limits.memory_mb) if self.cgroups else None
                if group:
                    cleanup.callback(group.remove)
                source = sealed_memfd(stdin)
                cleanup.callback(os.close, source)
                return await self._run(job, source, group)

    def _in_host_folder(self, job: Job, cleanup: ExitStack) -> Job:
        """Give a job a working folder on the host, with copies of the files bound into it."""
        folder = job.folder or tempfile.mkdtemp(dir=self.folder)
        if not job.folder:
            cleanup.callback(shutil.rmtree, folder)
        for here, there in job.binds:
            if there.startswith(f"{WORK}/"):
                shutil.copy(here, f"{folder}{there[len(WORK) :]}")
        return dataclasses.replace(job, folder=folder)

    async def _run(self, job: Job, stdin: int, group: Cgroup | None) -> Outcome:
        loop, started = asyncio.get_running_loop(), time.monotonic()
        run, pipes = self._start(job, stdin, group)
        try:
            timer = loop.call_later(job.limits.wall_seconds, run.stop, "timeout")
            watch = loop.create_task(self._watch(run))
            await self._wait(run)
            wall = time.monotonic() - started
            timer.cancel()
            await watch
            for descriptor, kept in pipes.items():  # not until EOF: a stray process may hold them open
                while self._read(run, descriptor, kept):
                    pass
        finally:
            for descriptor in pipes:
                loop.remove_reader(descriptor)
                os.close(descriptor)
            if run.hold is not None:
                os.close(run.hold)
        usage = await self._settle(run)
        stopped = "memory" if group and group.out_of_memory() else run.stopped
        code = -1 if stopped else self.backend.exit_code(bytes(run.status), run.code)
        if code is None:
            message = bytes(run.stderr).decode(errors="replace").strip()
            raise SandboxFailure(f"{self.backend.name}: {message or 'no exit code'}")
        cpu = max(run.cpu_seconds, usage.ru_utime + usage.ru_stime)
        memory = (group.peak_mb() if group else 0.0) or usage.ru_maxrss / 1024
        return Outcome(code, stopped, cpu, wall, memory, bytes(run.stdout), bytes(run.stderr))

    async def _wait(self, run: _Run) -> None:
        try:
            await run.ended.wait()
        except asyncio.CancelledError:  # the client is gone
            run.stop("timeout")
            await run.ended.wait()
            await self._settle(run)
            raise

    def _start(self, job: Job, stdin: int, group: Cgroup | None) -> tuple[_Run, dict[int, bytearray]]:
        pairs = {number: os.pipe() for number in (STDOUT, STDERR, STATUS)}
        theirs = {number: pair[1] for number, pair in pairs.items()}
        theirs |= {STDIN: stdin, FILTER: sealed_memfd(self._filter)}
        hold = None
        if self.backend.holds:
            theirs[HOLD], hold = os.pipe()
        try:
            pid = self.backend.start(job, theirs, group.add if group else None)
        except OSError as error:  # the sandbox's program is missing or not accessible
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
        """Let a sandbox that holds start, once the process to put into the cgroup is known."""
        child = self.backend.child(bytes(run.status))
        if child is not None and run.hold is not None:
            self._reaped_usage.pop(child, None)  # an earlier process had the same pid: this one still waits
            with suppress(ProcessLookupError):
                if run.group:
                    run.group.add(child)
            os.write(run.hold, b"1")
            os.close(run.hold)
            run.hold = None

    # --- while it runs --------------------------------------------------------------------------

    def _read(self, run: _Run, descriptor: int, kept: bytearray) -> bool:
        """Read what a pipe holds. False: nothing more to read."""
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
            run.stopped = run.stopped or "output_limit"  # also if the run has ended
            return False
        return True

    async def _watch(self, run: _Run) -> None:
        """Enforce the CPU time of all processes of a run together, and its memory without a cgroup.

        The kernel's final report leaves out children that no process has waited for.
        """
        limits = run.job.limits
        while not run.ended.is_set():
            processes = [*process_tree(run.pid)]
            run.cpu_seconds = max(run.cpu_seconds, sum(map(cpu_seconds, processes)))
            if run.cpu_seconds > limits.time + _SLACK_SECONDS:
                run.stop("timeout")
            if not run.group and sum(map(memory_mb, processes)) > limits.memory_mb:
                run.stop("memory")
            with suppress(TimeoutError):
                await asyncio.wait_for(run.ended.wait(), _WATCH_SECONDS)

    def _reap(self) -> None:
        """Reap all children that have ended, adopted orphans included."""
        with suppress(ChildProcessError):
            while (child := os.wait4(-1, os.WNOHANG))[0]:
                pid, status, self._reaped_usage[child[0]] = child
                self._child_reaped.set()
                if run := self._runs.get(pid):
                    run.code = os.waitstatus_to_exitcode(status)
                    run.ended.set()

    # --- its end --------------------------------------------------------------------------------

    async def _settle(self, run: _Run) -> resource.struct_rusage:
        """Kill the remaining processes of a run; return the resource usage of the program without the sandbox."""
        inner = self.backend.child(bytes(run.status))
        deadline = time.monotonic() + _SETTLE_SECONDS
        while left := self._remaining(run, inner):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise SandboxFailure(f"processes of a run could not be killed within {_SETTLE_SECONDS:.0f} s")
            self._child_reaped.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._child_reaped.wait(), _SETTLE_POLL_SECONDS)
        del self._runs[run.pid]
        own = self._reaped_usage.pop(run.pid)
        usage = self._reaped_usage.pop(inner) if inner else own
        if not self._runs:
            self._reaped_usage.clear()  # orphans
        return usage

    def _remaining(self, run: _Run, inner: int | None) -> set[int]:
        left = {*run.group.processes()} if run.group else set()
        return left | {inner} if inner and inner not in self._reaped_usage else left
