"""Client of the sandbox server, which is a separate process started once, before CUDA."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from sdzero.graders.errors import GraderError, NoSandboxError
from sdzero.graders.sandbox.backends import BACKENDS
from sdzero.graders.sandbox.connection import Connection
from sdzero.graders.sandbox.protocol import ServerOptions, frame
from sdzero.graders.sandbox.types import AssertTest, CallTest, CodeVerdict, RunResult, Submission

log = logging.getLogger(__name__)

_NUM_STARTS = 3  # of a server that dies or hangs, per batch
_PYTHONS = ("/usr/bin/python3", "/bin/python3")


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
        self._connection.send(frame(batch))
        for _ in indices:
            answer = self._connection.receive()
            if "error" in answer:
                self._connection.close()  # the server cancels the rest of the batch
                raise GraderError(answer["error"])
            row = answer["verdict"]
            results = tuple(RunResult(**result) for result in row["tests"])
            verdicts[indices[answer["index"]]] = CodeVerdict(**{**row, "tests": results})
            progress(len(verdicts))


def check_submission(submission: Submission) -> None:
    """Raise ValueError if a submission cannot be graded, whatever its program."""
    kinds = {type(test) for test in submission.tests}
    if len(kinds) != 1:
        raise ValueError(f"a submission needs tests of one kind, got {sorted(kind.__name__ for kind in kinds)}")
    if submission.language != "python" and kinds & {CallTest, AssertTest}:
        raise ValueError(
            f"{kinds.pop().__name__} is for python only, the submission's language is {submission.language}"
        )
