"""Sandbox server: tests the backends, drops root, and grades the submissions it receives over a socket.

`python -m sdzero.graders.sandbox.server FOLDER OPTIONS`: FOLDER is the client's and holds the socket; OPTIONS are JSON.
Prints one line, the `Handshake`, to standard output. Ends with its last client. All messages are lines of JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from sdzero.graders.errors import GraderError
from sdzero.graders.sandbox.backend import HOLD
from sdzero.graders.sandbox.backends import BACKENDS, SANDBOXES
from sdzero.graders.sandbox.executor import Executor
from sdzero.graders.sandbox.program_cache import ProgramCache
from sdzero.graders.sandbox.resources import Cgroups, ResourceSemaphore
from sdzero.graders.sandbox.self_test import find_weakness
from sdzero.graders.sandbox.submission_grader import SubmissionGrader
from sdzero.graders.sandbox.types import Checker, Handshake, Limits, ServerOptions, Submission, Test, parse_tests

HEARTBEAT_SECONDS = 1.0  # between empty messages while a client waits
UID = 61_357  # unprivileged, unused uid that root drops to
_MEMORY_SHARE = 0.8  # of the free memory, for all runs together
_FIRST_CLIENT_SECONDS = 60.0


class SandboxServer:
    """Receives batches from any number of clients and answers each submission when it is graded."""

    def __init__(self, grader: SubmissionGrader) -> None:
        self.grader = grader
        self.done = asyncio.Event()
        self._num_clients = 0
        self._num_running = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client until it disconnects, then cancel its pending submissions."""
        self._num_clients += 1
        tasks: set[asyncio.Task[None]] = set()
        heartbeats = asyncio.ensure_future(_send_heartbeats(writer, tasks))
        try:
            while True:
                batch = json.loads(await reader.readuntil())
                tests = [parse_tests(rows) for rows in batch["tests"]]
                for index, row in enumerate(batch["submissions"]):
                    task = asyncio.ensure_future(self._answer(index, _submission(row, tests), writer))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for task in (heartbeats, *tasks):
                task.cancel()
            await asyncio.gather(heartbeats, *tasks, return_exceptions=True)
            writer.close()
            self._num_clients -= 1
            self.end_if_unused()

    def end_if_unused(self) -> None:
        if not self._num_clients:
            self.done.set()

    async def _answer(self, index: int, submission: Submission, writer: asyncio.StreamWriter) -> None:
        if not self._num_running:
            self.grader.programs.evict()
        self._num_running += 1
        try:
            verdict = await self.grader.grade(submission)
            answer: dict[str, Any] = {"verdict": dataclasses.asdict(verdict)}
        except Exception as error:  # noqa: BLE001 - sent to the client, which would wait otherwise
            message = str(error) if isinstance(error, GraderError) else f"{type(error).__name__}: {error}"
            answer = {"error": message}
        finally:
            self._num_running -= 1
        await _send(writer, {"index": index, **answer})


async def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


async def _send_heartbeats(writer: asyncio.StreamWriter, tasks: set[asyncio.Task[None]]) -> None:
    """Send empty messages to a client that waits for answers."""
    while True:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        if tasks:
            await _send(writer, {})


def _submission(row: dict[str, Any], tests: list[tuple[Test, ...]]) -> Submission:
    checker = Checker(**row["checker"]) if row["checker"] else None
    files = tuple(row["files"]) if row["files"] else None
    parts = {"tests": tests[row["tests"]], "limits": Limits(**row["limits"]), "checker": checker, "files": files}
    return Submission(**{**row, **parts})


async def _run(
    options: ServerOptions, listener: socket.socket, work: Path, cgroups: Cgroups | None, ready: int
) -> None:
    names = [backend.name for backend in SANDBOXES] if options.backend == "auto" else [options.backend]
    kinds = [BACKENDS[name]() for name in names]
    missing = {kind.name: kind.missing() for kind in kinds}  # before dropping root: some import their package
    _drop_root()
    semaphore = ResourceSemaphore(options.num_workers, _free_mb() * _MEMORY_SHARE)
    rejected: list[str] = []
    executor = None
    for kind in kinds:
        candidate = Executor(kind, semaphore, cgroups, work / "runs")
        reason = missing[kind.name] or await find_weakness(candidate, options.python, work)
        if reason is None:
            executor = candidate
            break
        rejected.append(f"{kind.name}: {reason}")
    found = Handshake(executor and executor.backend.name, rejected, str(cgroups.folder) if cgroups else None)
    os.write(ready, json.dumps(dataclasses.asdict(found)).encode() + b"\n")
    os.close(ready)
    if executor:
        programs = ProgramCache(executor, work / "programs", options.python)
        await _listen(SandboxServer(SubmissionGrader(executor, programs, work / "runner", work / "runs")), listener)


async def _listen(server: SandboxServer, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.done.set)
    loop.call_later(_FIRST_CLIENT_SECONDS, server.end_if_unused)
    await asyncio.start_unix_server(server.serve, sock=listener, limit=sys.maxsize)
    await server.done.wait()
    running = asyncio.all_tasks() - {asyncio.current_task()}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def _drop_root() -> None:
    """Become a user that owns nothing, if root."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)


def _free_mb() -> float:
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) / 1024


def main() -> None:
    folder, options = Path(sys.argv[1]), ServerOptions(**json.loads(sys.argv[2]))
    ready = os.dup(1)
    while (reserved := os.open(os.devnull, os.O_RDWR)) <= HOLD:
        pass  # reserved for sandboxes
    os.close(reserved)
    listener = socket.socket(socket.AF_UNIX)
    (folder / "socket").unlink(missing_ok=True)
    listener.bind(str(folder / "socket"))
    listener.listen()  # before the handshake
    work = Path(f"{folder}-work")
    shutil.rmtree(work, ignore_errors=True)  # left by a killed server
    for place in (work, *(work / name for name in ("programs", "runs", "runner"))):
        place.mkdir(mode=0o700)
    shutil.copy(Path(__file__).with_name("call_runner.py"), work / "runner")
    as_root = os.getuid() == 0
    if as_root:
        for path in (work, *work.rglob("*")):
            os.chown(path, UID, UID)
    cgroups = Cgroups.delegate(UID if as_root else os.getuid()) if options.cgroups else None
    try:
        asyncio.run(_run(options, listener, work, cgroups, ready))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
