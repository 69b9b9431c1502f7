"""Client of the sandbox server, which is a separate process started once, before CUDA."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdzero.graders.errors import GraderError, NoSandboxError
from sdzero.graders.sandbox.backends import BACKENDS
from sdzero.graders.sandbox.types import CodeVerdict, Handshake, RunResult, ServerOptions, Submission, check_submission

log = logging.getLogger(__name__)

_NUM_STARTS = 3  # of a server that dies or hangs, per batch
_PYTHONS = ("/usr/bin/python3", "/bin/python3")
SILENCE_SECONDS = 60.0  # without a message: the server hangs
_START_SECONDS = 60.0
_END_SECONDS = 5.0
# variables that identify the job, whose processes on a node share one server
JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


class SandboxClient:
    """Grades programs in a server process that all processes of one job on a node share.

    A server that dies or hangs is restarted and receives the unanswered submissions again.

    Args:
        backend: `auto`, `bubblewrap`, `nsjail` or `sandlock`; `unsafe` runs programs without a sandbox.
        num_workers: concurrent programs; null takes one per core.
        python: interpreter in the sandbox, below /usr; null takes the system's python3.
        cgroups: use a cgroup for the memory limit where the machine delegates one; else the processes are polled.

    Attributes:
        backend: name of the sandbox in use.
        counted: a cgroup limits the memory of runs.

    Raises:
        ValueError: unknown backend or missing interpreter.
        NoSandboxError: no sandbox is safe on this machine.
    """

    def __init__(
        self, backend: str = "auto", num_workers: int | None = None, python: str | None = None, cgroups: bool = True
    ) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend must be auto or one of {[*BACKENDS]}, got {backend!r}")
        if sys.platform != "linux":
            raise NoSandboxError(f"the code sandbox needs Linux; this is {sys.platform}")
        found = python or next(filter(os.path.exists, _PYTHONS), None)
        if not found or not os.path.exists(found):
            raise ValueError(
                f"python: no interpreter at {found or _PYTHONS[0]}: install one below /usr (apt install python3)"
            )
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self.options = ServerOptions(backend, num_workers or len(os.sched_getaffinity(0)), found, cgroups)
        self.backend, self.counted = "", False
        self._lock = threading.Lock()
        self._connection = Connection(self.options)
        self._close = weakref.finalize(self, self._connection.close)
        with self._lock:
            self._open()

    def __enter__(self) -> SandboxClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect from the server, which ends with its last client."""
        self._close()

    def grade(
        self, submissions: Sequence[Submission], progress: Callable[[int], None] = lambda done: None
    ) -> list[CodeVerdict]:
        """Grade submissions and return the verdicts in order. Calls `progress` with the number received so far.

        Raises:
            ValueError: a submission has no tests, or tests that its language does not support.
            GraderError: the sandbox failed repeatedly.
        """
        for submission in submissions:
            check_submission(submission)
        verdicts: dict[int, CodeVerdict] = {}
        with self._lock:
            for number in range(1, _NUM_STARTS + 1):
                left = [index for index in range(len(submissions)) if index not in verdicts]
                try:
                    self._open()
                    self._ask(submissions, left, verdicts, progress)
                    break
                except (ConnectionError, TimeoutError, EOFError) as error:
                    self._connection.abandon()
                    if number == _NUM_STARTS:
                        raise GraderError(f"the sandbox server died {number} times in one batch: {error}") from error
                    log.warning("the sandbox server died; restarting it for the ungraded submissions")
        return [verdicts[index] for index in range(len(submissions))]

    def _open(self) -> None:
        if found := self._connection.open():
            self.backend, self.counted = found.backend or "", found.cgroup is not None
            if self.backend == "unsafe":
                log.warning("backend unsafe: programs run WITHOUT a sandbox, with the rights of this user")
            elif found.rejected:
                log.warning("using sandbox %s; rejected: %s", self.backend, "; ".join(found.rejected))

    def _ask(
        self,
        submissions: Sequence[Submission],
        indices: list[int],
        verdicts: dict[int, CodeVerdict],
        progress: Callable[[int], None],
    ) -> None:
        tests: dict[int, int] = {}  # responses to one question share its tests, which are sent once
        batch: dict[str, list[Any]] = {"tests": [], "submissions": []}
        for index in indices:
            submission = submissions[index]
            if id(submission.tests) not in tests:
                tests[id(submission.tests)] = len(tests)
                batch["tests"].append([dataclasses.asdict(test) for test in submission.tests])
            row = dataclasses.asdict(dataclasses.replace(submission, tests=()))
            batch["submissions"].append({**row, "tests": tests[id(submission.tests)]})
        self._connection.send(batch)
        for _ in indices:
            answer = self._connection.receive()
            if "error" in answer:
                self._connection.close()  # the server cancels the rest of the batch
                raise GraderError(answer["error"])
            row = answer["verdict"]
            results = tuple(RunResult(**result) for result in row["tests"])
            verdicts[indices[answer["index"]]] = CodeVerdict(**{**row, "tests": results})
            progress(len(verdicts))


class Connection:
    """Socket to the server of this job, which the first process to connect starts."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._socket: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        job = [os.environ.get(name, "") for name in JOB_VARIABLES]
        private = [] if any(job) else [os.getpid(), id(self)]
        name = hashlib.sha256(json.dumps([job, private, dataclasses.astuple(options)]).encode()).hexdigest()[:12]
        self.folder = Path(tempfile.gettempdir()) / f"sdzero-sandbox-{os.getuid()}-{name}"

    def open(self) -> Handshake | None:
        """Connect, starting the server if there is none. None if already connected."""
        if self._socket:
            return None
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise GraderError(f"{self.folder} belongs to another user: remove it")
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the node starts the server; the others wait here
            if not self._connect():
                self._start()
                if not self._connect():
                    raise GraderError("the sandbox server ended right after its start")
        return Handshake(**json.loads((self.folder / "handshake.json").read_text()))

    def _connect(self) -> bool:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SILENCE_SECONDS)
        self._lines = self._socket.makefile("rb")
        with suppress(OSError):
            self._socket.connect(str(self.folder / "socket"))
            return True
        self.disconnect()
        return False

    def _start(self) -> None:
        """Start the server, without this process's environment, and wait until it has chosen a sandbox."""
        _kill_remains(self.folder)
        _remove_orphaned_folders()
        options = json.dumps(dataclasses.asdict(self.options))
        argv = [sys.executable, "-m", "sdzero.graders.sandbox.server", str(self.folder), options]
        environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert self.process.stdout
        with self.process.stdout as ready:
            there, _, _ = select.select([ready], [], [], _START_SECONDS)
            line = ready.readline() if there else b""
        if not line:
            self.process.kill()
            raise GraderError(f"the sandbox server did not start (exit code {self.process.wait()})")
        (self.folder / "handshake.json").write_bytes(line)
        found = Handshake(**json.loads(line))
        if found.backend is None:
            self.close()
            raise NoSandboxError(
                "no sandbox is safe on this machine, so no program is run. "
                + "; ".join(found.rejected)
                + ". Fix one of them, or set backend: unsafe for programs that you trust like your own"
            )

    def send(self, message: dict[str, Any]) -> None:
        assert self._socket
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Receive the next answer, skipping the empty heartbeat messages.

        Raises:
            EOFError, OSError: the server has ended, or hangs.
        """
        while True:
            line = self._lines.readline()
            if not line.endswith(b"\n"):
                raise EOFError("the connection was closed")
            if answer := json.loads(line):
                return answer

    def disconnect(self) -> None:
        if self._socket:
            self._lines.close()
            self._socket.close()
            self._socket = None

    def abandon(self) -> None:
        """Disconnect from a server that no longer answers; kill it if this process started it."""
        self.disconnect()
        if self.process:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Disconnect; wait for the server if this process started it, and remove its remains."""
        self.disconnect()
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired):  # it still has another client
            self.process.wait(_END_SECONDS)
            self.process = None
            _remove(self.folder)


def _kill_remains(folder: Path) -> None:
    """Kill the sandboxes that a killed server has left, and remove its cgroup."""
    for process in Path("/proc").glob("[0-9]*"):  # bubblewrap orphaned at its start waits forever
        with suppress(OSError):
            if os.fsencode(folder) in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
    with suppress(OSError, ValueError, KeyError):
        if place := json.loads((folder / "handshake.json").read_text())["cgroup"]:
            deadline = time.monotonic() + _END_SECONDS
            while Path(place).exists() and time.monotonic() < deadline:  # killed processes may not have ended yet
                for group in (*Path(place).glob("*/"), Path(place)):
                    with suppress(OSError):
                        group.rmdir()
                time.sleep(0.001)


def _remove(folder: Path) -> None:
    _kill_remains(folder)
    for path in (Path(f"{folder}-work"), folder):
        shutil.rmtree(path, ignore_errors=True)


def _remove_orphaned_folders() -> None:
    """Remove the folders of servers whose clients were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"sdzero-sandbox-{os.getuid()}-*"):
        if folder.name.endswith("-work") or not (folder / "handshake.json").exists():
            continue
        with suppress(OSError), (folder / "lock").open() as lock, socket.socket(socket.AF_UNIX) as listener:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held while a server starts
            if listener.connect_ex(str(folder / "socket")):  # no server listens
                _remove(folder)
