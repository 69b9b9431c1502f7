"""The carriers between a task and the judge: a program with its tests goes in, a verdict with its figures comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdzero.types import Reason

Language = Literal["cpp", "python"]
Compare = Literal["tokens", "lines"]


@dataclass(frozen=True)
class Limits:
    """What one run of a program may use.

    Args:
        time: seconds of CPU time on one test.
        memory_mb: memory of all its processes together, in MiB.
        processes: processes and threads at one time.
        files_mb: MiB that it may write to files.
        output_mb: MiB of standard output and error together; more is `output_limit`.
        wall: seconds on the clock; null allows twice the CPU time and two seconds.
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
    """The program reads `input` and must write `output`."""

    input: str
    output: str


@dataclass(frozen=True)
class CallTest:
    """`call`(*args) must return `expected`, which never enters the sandbox. Values are what JSON can write.

    `call` names a function, or a method of the program's class `Solution`. Python only.
    """

    call: str
    args: tuple[Any, ...]
    expected: Any


@dataclass(frozen=True)
class AssertTest:
    """`program`, run after the submission in the same file, must come to its end. Python only.

    Forgeable: a hostile submission can end the process, or change what the assertions call.
    """

    program: str


Test = StdioTest | CallTest | AssertTest


@dataclass(frozen=True)
class Checker:
    """A program `checker input correct output` that prints 1 or 100 for a right output, 0 for a wrong one."""

    language: Language
    source: str


@dataclass(frozen=True)
class Submission:
    """A program and what it is held against.

    Args:
        language: `cpp` (C++17) or `python`.
        source: the program's text.
        tests: run in order, up to the first failed one.
        limits: of each test's run.
        compare: `tokens` collapses white space and ignores the case of yes and no; `lines` compares line by line,
            then numbers by their value.
        checker: decides in place of `compare`.
        files: names of the input and the output file, for programs that use these in place of stdin and stdout.
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
    """One run. Texts are the first 2 kB. `memory_mb` is the largest resident size of one process, in MiB."""

    reason: Reason
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    memory_mb: float = 0.0
    stdout: str = ""
    stderr: str = ""


@dataclass(frozen=True)
class CodeVerdict:
    """`tests` holds the runs up to the first failed one; `message` is the compiler's, or why there was no run."""

    reward: Literal[0, 1]
    reason: Reason
    backend: str
    tests: tuple[RunResult, ...] = ()
    message: str = ""


def read_test(row: Mapping[str, Any]) -> Test:
    """A test of a TESTS.json: {"input", "output"}, {"call", "args", "expected"} or {"program"}.

    Raises:
        ValueError: the row is none of them; names what it has.
    """
    for kind, keys in (
        (StdioTest, {"input", "output"}),
        (CallTest, {"call", "args", "expected"}),
        (AssertTest, {"program"}),
    ):
        if {*row} == keys:
            values = {**row, "args": tuple(row["args"])} if "args" in keys else row
            return kind(**values)
    raise ValueError(
        f'a test is {{"input", "output"}}, {{"call", "args", "expected"}} or {{"program"}}; this one has {sorted(row)}'
    )
