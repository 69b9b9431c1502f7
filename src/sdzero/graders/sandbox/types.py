"""Data types of the sandbox: programs with tests and limits, their verdicts, and what starts its server."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from sdzero.types import Reason

Language = Literal["cpp", "python"]
Compare = Literal["tokens", "lines"]


@dataclass(frozen=True)
class Limits:
    """Limits of one run of a program.

    Args:
        time: CPU seconds per test.
        memory_mb: memory of all processes of the run together, in MiB.
        processes: concurrent processes and threads.
        files_mb: MiB written to files.
        output_mb: MiB of standard output and error together; more is `output_limit`.
        wall: wall-clock seconds; null allows twice the CPU time plus two seconds.
    """

    time: float = 10.0
    memory_mb: float = 512.0
    processes: int = 64
    files_mb: int = 64
    output_mb: int = 16
    wall: float | None = None

    def __post_init__(self) -> None:
        for name in ("time", "memory_mb", "processes", "files_mb", "output_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"limits.{name} must be above 0, got {getattr(self, name)}")
        if self.wall is not None and not self.wall > 0:
            raise ValueError(f"limits.wall must be above 0, or null, got {self.wall}")

    @property
    def wall_seconds(self) -> float:
        return 2 * self.time + 2 if self.wall is None else self.wall


@dataclass(frozen=True)
class StdioTest:
    """Test by standard input and the expected standard output."""

    input: str
    output: str


@dataclass(frozen=True)
class CallTest:
    """Test that `call`(*args) returns `expected`, which never enters the sandbox. All values are JSON. Python only.

    `call` names a function, or a method of the program's class `Solution`.
    """

    call: str
    args: tuple[Any, ...]
    expected: Any


@dataclass(frozen=True)
class AssertTest:
    """Test that `program`, appended to the submission, runs to its end. Python only.

    Forgeable: a hostile submission can end the process or replace what the assertions call.
    """

    program: str


Test = StdioTest | CallTest | AssertTest


@dataclass(frozen=True)
class Checker:
    """Program `checker INPUT CORRECT OUTPUT` that prints 1 or 100 for a right output, 0 for a wrong one."""

    language: Language
    source: str


@dataclass(frozen=True)
class Submission:
    """Program with its tests.

    Args:
        language: `cpp` (C++17) or `python`.
        source: source code of the program.
        tests: run in order, up to the first failed one.
        limits: limits of each test's run.
        compare: `tokens` collapses white space and ignores the case of yes and no; `lines` compares line by line,
            then numbers by their value.
        checker: decides instead of `compare`.
        files: names of the input and output file, for programs that use files instead of stdin and stdout.
    """

    language: Language
    source: str
    tests: tuple[Test, ...]
    limits: Limits = field(default_factory=Limits)
    compare: Compare = "tokens"
    checker: Checker | None = None
    files: tuple[str, str] | None = None


@dataclass(frozen=True)
class RunResult:
    """Result of one test. Texts are cut at 2 kB; `memory_mb` is the peak in MiB (of one process without a cgroup)."""

    reason: Reason
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    memory_mb: float = 0.0
    stdout: str = ""
    stderr: str = ""


@dataclass(frozen=True)
class CodeVerdict:
    """Verdict on a submission. `tests` ends with the first failed one; `message` is the compiler's."""

    reward: Literal[0, 1]
    reason: Reason
    backend: str
    tests: tuple[RunResult, ...] = ()
    message: str = ""


@dataclass(frozen=True)
class ServerOptions:
    """Options of `SandboxClient` that the server needs."""

    backend: str
    num_workers: int
    python: str
    cgroups: bool


@dataclass(frozen=True)
class Handshake:
    """Result of the server's start: the sandbox (None: none is safe), why others were rejected, the cgroup's folder."""

    backend: str | None
    rejected: list[str]
    cgroup: str | None


def parse_tests(cell: Any) -> tuple[Test, ...]:
    """Parse the tests of a cell: a list of objects, or its JSON. Raises: ValueError if they are malformed."""
    if isinstance(cell, str) and (cell := cell.strip()):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its tests are not valid JSON: {error}") from None
    if not cell:
        raise ValueError("it has no tests")
    if not isinstance(cell, list) or not all(isinstance(row, dict) for row in cell):
        raise ValueError("its tests are not a list of objects")
    return tuple(_parse_test(number, row) for number, row in enumerate(cell, 1))


def _parse_test(number: int, row: dict[str, Any]) -> Test:
    for key, value in row.items():
        kind, name = (list, "list") if key == "args" else (str, "string")
        if key != "expected" and not isinstance(value, kind):
            raise ValueError(f"test {number}: {key!r} is not a {name}")
    if row.keys() == {"input", "output"}:
        return StdioTest(**row)
    if row.keys() == {"call", "args", "expected"}:
        return CallTest(row["call"], tuple(row["args"]), row["expected"])
    if row.keys() == {"program"}:
        return AssertTest(**row)
    raise ValueError(
        f'test {number}: a test is {{"input", "output"}}, {{"call", "args", "expected"}} or {{"program"}}; '
        f"this one has {sorted(row)}"
    )


def check_submission(submission: Submission) -> None:
    """Raise ValueError if a submission cannot be graded, whatever its program."""
    kinds = {type(test) for test in submission.tests}
    if len(kinds) != 1:
        raise ValueError(f"a submission needs tests of one kind, got {sorted(kind.__name__ for kind in kinds)}")
    if submission.language != "python" and kinds & {CallTest, AssertTest}:
        raise ValueError(
            f"{kinds.pop().__name__} is for python only, the submission's language is {submission.language}"
        )
