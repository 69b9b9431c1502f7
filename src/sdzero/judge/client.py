"""The trainer's side of the judge: starts its process once, before CUDA, and asks it over a socket."""

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

from sdzero.judge.backends import BACKENDS
from sdzero.judge.types import AssertTest, CallTest, CodeVerdict, JudgeError, Refused, RunResult, Submission
from sdzero.judge.wire import LENGTH, Found, Options, frame

log = logging.getLogger(__name__)

_NUM_STARTS = 3  # of a judge that dies in one batch
_START_SECONDS = 60.0
_END_SECONDS = 5.0
_PYTHONS = ("/usr/bin/python3", "/bin/python3")
# what names the job that several processes of this node belong to; each starts no judge of its own
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


class Judge:
    """Judges programs in a process of its own, which all processes of one job on a node share.

    A judge that dies is started again and asked again for what it had not answered.

    Args:
        backend: `auto`, or a sandbox by name: `bubblewrap`, `nsjail`, `sandlock`; `unsafe` is none.
        num_workers: programs that run at a time; null takes one per core.
        python: interpreter in the sandbox, below /usr; null takes the system's python3.
        cgroups: let the kernel count the memory of each run where it lets us; else it is watched.

    Attributes:
        backend: the sandbox that was found.
        counted: whether a cgroup counts the memory of its runs.

    Raises:
        ValueError: no such backend or interpreter.
        Refused: no sandbox holds here.
    """

    def __init__(
        self,
        backend: str = "auto",
        num_workers: int | None = None,
        python: str | None = None,
        cgroups: bool = True,
    ) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend must be auto or one of {[*BACKENDS]}, got {backend!r}")
        if sys.platform != "linux":
            raise Refused(f"programs are judged on Linux, where the sandboxes are; this is {sys.platform}")
        found = python or next(filter(os.path.exists, _PYTHONS), None)
        if not found or not os.path.exists(found):
            raise ValueError(
                f"python: no interpreter at {found or _PYTHONS[0]}: install one below /usr (apt install python3)"
            )
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self.options = Options(backend, num_workers or len(os.sched_getaffinity(0)), found, cgroups)
        self.backend, self.counted = "", False
        self._lock = threading.Lock()
        self._connection = _Connection(self.options)
        self._close = weakref.finalize(self, self._connection.close)
        with self._lock:
            self._open()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the judge, which ends with the last to leave."""
        self._close()

    def judge(
        self, submissions: Sequence[Submission], progress: Callable[[int], None] = lambda done: None
    ) -> list[CodeVerdict]:
        """The verdicts, in order. `progress` hears the number of verdicts that have come in.

        Raises:
            ValueError: a submission has no tests, or tests that its language cannot have.
            JudgeError: the machinery failed, several times over.
        """
        for submission in submissions:
            check(submission)
        verdicts: dict[int, CodeVerdict] = {}
        with self._lock:
            for number in range(1, _NUM_STARTS + 1):
                left = [index for index in range(len(submissions)) if index not in verdicts]
                try:
                    self._open()
                    self._ask(submissions, left, verdicts, progress)
                    break
                except (ConnectionError, EOFError) as error:
                    self._connection.disconnect()
                    if number == _NUM_STARTS:
                        raise JudgeError(f"the judge died {number} times in one batch: {error}") from error
                    log.warning("the judge died and is started again for what it had not judged")
        return [verdicts[index] for index in range(len(submissions))]

    def _open(self) -> None:
        if found := self._connection.open():
            self.backend, self.counted = found.backend or "", found.cgroup is not None
            if self.backend == "unsafe":
                log.warning("judge: backend unsafe: programs run WITHOUT a sandbox, with the rights of this user")
            elif found.refused:
                log.warning(
                    "judge: sandbox %s, since the ones before it would not do: %s",
                    self.backend,
                    "; ".join(found.refused),
                )

    def _ask(
        self,
        submissions: Sequence[Submission],
        indices: list[int],
        verdicts: dict[int, CodeVerdict],
        progress: Callable[[int], None],
    ) -> None:
        tests: dict[int, int] = {}  # many responses share the tests of one question: they are sent once
        batch: dict[str, list[Any]] = {"tests": [], "submissions": []}
        for index in indices:
            submission = submissions[index]
            if id(submission.tests) not in tests:
                tests[id(submission.tests)] = len(tests)
                batch["tests"].append([dataclasses.asdict(test) for test in submission.tests])
            row = dataclasses.asdict(dataclasses.replace(submission, tests=()))
            batch["submissions"].append({**row, "tests": tests[id(submission.tests)]})
        self._connection.send(frame(batch))
        for _ in indices:
            answer = self._connection.receive()
            if "fault" in answer:
                self._connection.close()  # the judge drops what else it was asked
                raise JudgeError(answer["fault"])
            row = answer["verdict"]
            results = tuple(RunResult(**result) for result in row["tests"])
            verdicts[indices[answer["index"]]] = CodeVerdict(**{**row, "tests": results})
            progress(len(verdicts))


def check(submission: Submission) -> None:
    """Raises: ValueError if a submission cannot be judged, whatever its program."""
    kinds = {type(test) for test in submission.tests}
    if len(kinds) != 1:
        raise ValueError(f"a submission needs tests of one kind, got {sorted(kind.__name__ for kind in kinds)}")
    if submission.language != "python" and kinds & {CallTest, AssertTest}:
        raise ValueError(
            f"{kinds.pop().__name__} is for python only, the submission's language is {submission.language}"
        )


class _Connection:
    """The socket to the judge of this job, which the first to come starts."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._found: Found | None = None
        job = [os.environ.get(name, "") for name in _JOB]
        alone = [] if any(job) else [os.getpid(), id(self)]
        name = hashlib.sha256(json.dumps([job, alone, dataclasses.astuple(options)]).encode()).hexdigest()[:12]
        self.folder = Path(tempfile.gettempdir()) / f"sdzero-judge-{os.getuid()}-{name}"

    def open(self) -> Found | None:
        """Connects, and starts the judge where there is none. Returns what it has found, once."""
        if self._socket:
            return None
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise JudgeError(f"{self.folder} belongs to another user: remove it")
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one of the node's processes starts it, the others wait here
            if not self._connect():
                self._start()
                if not self._connect():
                    raise JudgeError("the judge ended as soon as it was ready")
        return Found(**json.loads((self.folder / "found.json").read_text()))

    def _connect(self) -> bool:
        self._socket = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            self._socket.connect(str(self.folder / "socket"))
            return True
        self._socket.close()
        self._socket = None
        return False

    def _start(self) -> None:
        """Starts the judge and waits until it has found a sandbox. It gets nothing of this process's environment."""
        if self._process:
            self._process.kill()
            self._process.wait()
        _end_remains(self.folder)
        _remove_others()
        argv = [
            sys.executable,
            "-m",
            "sdzero.judge.server",
            str(self.folder),
            json.dumps(dataclasses.asdict(self.options)),
        ]
        environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert self._process.stdout
        with self._process.stdout as ready:
            there, _, _ = select.select([ready], [], [], _START_SECONDS)
            line = ready.readline() if there else b""
        if not line:
            self._process.kill()
            raise JudgeError(f"the judge did not start (exit code {self._process.wait()})")
        (self.folder / "found.json").write_bytes(line)
        found = Found(**json.loads(line))
        if found.backend is None:
            self.close()
            raise Refused(
                "no sandbox holds on this machine, so no program is run. "
                + "; ".join(found.refused)
                + ". Mend one of them; or, for programs that you trust as you trust your own, backend: unsafe"
            )

    def send(self, data: bytes) -> None:
        assert self._socket
        self._socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """Raises: EOFError if the judge has ended."""
        length = int.from_bytes(self._read(LENGTH), "big")
        return json.loads(self._read(length))

    def _read(self, number: int) -> bytes:
        assert self._socket
        data = bytearray()
        while len(data) < number:
            part = self._socket.recv(min(number - len(data), 1 << 20))
            if not part:
                raise EOFError("it closed the connection")
            data += part
        return bytes(data)

    def disconnect(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Waits for the judge that was started here, if nobody else asks it, and removes what it could not."""
        self.disconnect()
        if self._process is None:
            return
        with suppress(subprocess.TimeoutExpired):  # another process of this job still asks it
            self._process.wait(_END_SECONDS)
            self._process = None
            _remove(self.folder)


def _end_remains(folder: Path) -> None:
    """Ends the sandboxes that a killed judge has left, and removes its cgroup."""
    for process in Path("/proc").glob("[0-9]*"):  # bubblewrap, orphaned in its first milliseconds, waits for ever
        with suppress(OSError):
            if os.fsencode(folder) in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
    with suppress(OSError, ValueError):
        if place := Found(**json.loads((folder / "found.json").read_text())).cgroup:
            deadline = time.monotonic() + _END_SECONDS
            while Path(place).exists() and time.monotonic() < deadline:  # what was killed may not have ended yet
                for group in (*Path(place).glob("*/"), Path(place)):
                    with suppress(OSError):
                        group.rmdir()
                time.sleep(0.001)


def _remove(folder: Path) -> None:
    _end_remains(folder)
    for path in (Path(f"{folder}-work"), folder):
        shutil.rmtree(path, ignore_errors=True)


def _remove_others() -> None:
    """What is left of judges whose trainer was killed, and so could not remove it."""
    for folder in Path(tempfile.gettempdir()).glob(f"sdzero-judge-{os.getuid()}-*"):
        if folder.name.endswith("-work") or not (folder / "found.json").exists():
            continue
        with suppress(OSError), (folder / "lock").open() as lock, socket.socket(socket.AF_UNIX) as listener:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held while a judge is being started
            if listener.connect_ex(str(folder / "socket")):  # nobody listens
                _remove(folder)
