"""From a submission to its verdict: compile, run test by test up to the first failed one, compare on this side."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from sdzero.graders.errors import GraderError
from sdzero.graders.sandbox.backend import WORK, Job
from sdzero.graders.sandbox.comparators import decode_value, same_lines, same_tokens, same_value
from sdzero.graders.sandbox.executor import KEPT, Executor, Outcome, SandboxFailure
from sdzero.graders.sandbox.program_cache import BOX, Program, ProgramCache
from sdzero.graders.sandbox.types import (
    AssertTest,
    CallTest,
    Checker,
    CodeVerdict,
    Limits,
    RunResult,
    StdioTest,
    Submission,
    Test,
)
from sdzero.types import Reason

T = TypeVar("T")

_NUM_TRIES = 3  # of one run, before a broken sandbox is a fault of the machinery
_SIGXCPU, _SIGXFSZ = 128 + 24, 128 + 25
_OUT_OF_MEMORY = (b"std::bad_alloc", b"MemoryError", b"Cannot allocate memory")  # the last words of such a program
_NO_PROGRAM = (b"SyntaxError", b"IndentationError", b"TabError")  # Python's compile errors
_CHECKING = Limits(time=10, memory_mb=1024)
_DATA = "/data"
# runs a program whose answer is a file, writes that file out, and ends as the program did
_FILE_MODE = 'out=$1; shift; "$@" >/dev/null; code=$?; if [ -f "$out" ]; then cat "$out"; fi; exit $code'


class SubmissionGrader:
    """Judges submissions.

    Args:
        runs: where programs run.
        programs: where they are compiled.
        runner: the folder with call_runner.py, which calls a submission's function inside the sandbox.
        folder: for the files that a checker reads.
    """

    def __init__(self, runs: Executor, programs: ProgramCache, runner: Path, folder: Path) -> None:
        self.runs, self.programs, self.runner, self.folder = runs, programs, runner, folder

    async def grade(self, submission: Submission) -> CodeVerdict:
        """The verdict on one submission.

        Raises:
            GraderError: the machinery failed several times over.
        """
        backend = self.runs.backend.name
        results: list[RunResult] = []
        for test in submission.tests:
            program = await _tried(lambda test=test: self._program(submission, test))
            if program.error is not None:
                return CodeVerdict(0, "compile_error", backend, message=program.error)
            results.append(await _tried(lambda test=test, program=program: self._test(submission, program, test)))
            if results[-1].reason != "correct":
                break
        reason = results[-1].reason
        return CodeVerdict(1 if reason == "correct" else 0, reason, backend, tuple(results))

    async def _program(self, submission: Submission, test: Test) -> Program:
        if isinstance(test, CallTest):
            argv = (self.programs.python, "-I", "-B", f"{BOX}/call_runner.py")
            return Program(argv, ((str(self.runner), BOX),))
        source = submission.source
        if isinstance(test, AssertTest):
            source += f"\n\n{test.program}\n\n__import__('os').write(1, b'{_end_mark(submission, test)}')\n"
        return await self.programs.get(submission.language, source)

    async def _test(self, submission: Submission, program: Program, test: Test) -> RunResult:
        outcome = await self._run(submission, program, test)
        reason = _why_ended(outcome, submission)
        if reason is None:
            reason = "correct" if await self._is_right(submission, test, outcome) else "wrong"
        shown = (text[:KEPT].decode(errors="replace") for text in (outcome.stdout, outcome.stderr))
        return RunResult(reason, outcome.cpu_seconds, outcome.wall_seconds, outcome.memory_mb, *shown)

    async def _run(self, submission: Submission, program: Program, test: Test) -> Outcome:
        argv, binds = program.argv, program.binds
        if isinstance(test, CallTest):
            row = {"source": submission.source, "call": test.call, "args": test.args}
            return await self.runs.run(Job(argv, submission.limits, binds), json.dumps(row).encode())
        if isinstance(test, AssertTest):
            return await self.runs.run(Job(argv, submission.limits, binds))
        if not submission.files:
            return await self.runs.run(Job(argv, submission.limits, binds), to_bytes(test.input))
        read, written = submission.files
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            (Path(folder) / "input").write_bytes(to_bytes(test.input))
            argv = ("/bin/sh", "-c", _FILE_MODE, "sh", written, *argv)
            binds = (*binds, (f"{folder}/input", f"{WORK}/{read}"))
            return await self.runs.run(Job(argv, submission.limits, binds))

    async def _is_right(self, submission: Submission, test: Test, outcome: Outcome) -> bool:
        if isinstance(test, CallTest):
            returned, value = decode_value(outcome.stdout)
            return returned and same_value(test.expected, value)
        if isinstance(test, AssertTest):
            return _end_mark(submission, test).encode() in outcome.stdout
        if submission.checker:
            return await self._checked(submission.checker, test, outcome.stdout)
        same = same_lines if submission.compare == "lines" else same_tokens
        return same(test.output, outcome.stdout.decode(errors="surrogateescape"))

    async def _checked(self, checker: Checker, test: StdioTest, output: bytes) -> bool:
        """The checker's word, which it has in a sandbox too. One that fails on an output has not accepted it."""
        program = await self.programs.get(checker.language, checker.source)
        if program.error is not None:
            raise GraderError(f"the checker does not compile: {program.error}")
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for name, text in (("input", to_bytes(test.input)), ("output", output), ("correct", to_bytes(test.output))):
                (Path(folder) / name).write_bytes(text)
            argv = (*program.argv, *(f"{_DATA}/{name}" for name in ("input", "correct", "output")))
            outcome = await self.runs.run(Job(argv, _CHECKING, (*program.binds, (folder, _DATA))))
        if outcome.stopped or outcome.code:
            return False
        said = outcome.stdout.split()
        if len(said) != 1 or not said[0].replace(b".", b"", 1).isdigit():
            raise GraderError(f"the checker printed {outcome.stdout[:80]!r}; a checker prints a score: 1 or 100 passes")
        return said[0] in (b"1", b"100")


def to_bytes(text: str) -> bytes:
    """UTF-8, or the bytes that `surrogateescape` has kept."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="replace")


def _end_mark(submission: Submission, test: AssertTest) -> str:
    """What a run that came to the end of its assertions has written: a `sys.exit()` on the way has not."""
    return hashlib.sha256(f"{submission.source}\0{test.program}".encode(errors="surrogatepass")).hexdigest()


def _why_ended(outcome: Outcome, submission: Submission) -> Reason | None:
    """Why a run failed before its answer could be looked at; None where it came to its end."""
    if outcome.stopped:
        return outcome.stopped
    if outcome.cpu_seconds > submission.limits.time or outcome.code == _SIGXCPU:
        return "timeout"
    if outcome.code == 0:
        return None
    if outcome.code == _SIGXFSZ:
        return "output_limit"
    words = outcome.stderr.strip().rpartition(b"\n")[2]
    if submission.language == "python" and outcome.code == 1 and words.startswith(_NO_PROGRAM):
        return "compile_error"
    return "memory" if any(word in outcome.stderr for word in _OUT_OF_MEMORY) else "runtime_error"


async def _tried(attempt: Callable[[], Awaitable[T]]) -> T:
    """Tries again while the sandbox fails. Raises: GraderError after the last try."""
    for number in range(1, _NUM_TRIES + 1):
        try:
            return await attempt()
        except SandboxFailure as fault:
            if number == _NUM_TRIES:
                raise GraderError(f"{number} tries failed; the last: {fault}") from fault
    raise AssertionError
