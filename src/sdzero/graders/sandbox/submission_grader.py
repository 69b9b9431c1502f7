"""Grading of submissions: compile, run the tests up to the first failed one, compare outside the sandbox."""

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

_NUM_TRIES = 3  # of a run whose sandbox fails
_SIGXCPU, _SIGXFSZ = 128 + 24, 128 + 25
_OUT_OF_MEMORY = (b"std::bad_alloc", b"MemoryError", b"Cannot allocate memory")  # error output of such a program
_COMPILE_ERRORS = (b"SyntaxError", b"IndentationError", b"TabError")
_CHECKER_LIMITS = Limits(time=10, memory_mb=1024)
_DATA = "/data"
# runs a program that writes a file, prints that file, and exits with the program's code
_FILE_MODE = 'out=$1; shift; "$@" >/dev/null; code=$?; if [ -f "$out" ]; then cat "$out"; fi; exit $code'


class SubmissionGrader:
    """Grades submissions. `runner` is the folder with call_runner.py, `folder` holds temporary input files."""

    def __init__(self, executor: Executor, programs: ProgramCache, runner: Path, folder: Path) -> None:
        self.executor, self.programs, self.runner, self.folder = executor, programs, runner, folder

    async def grade(self, submission: Submission) -> CodeVerdict:
        """Grade one submission.

        Raises:
            GraderError: the sandbox failed repeatedly.
        """
        backend = self.executor.backend.name
        results: list[RunResult] = []
        for test in submission.tests:
            program = await _with_retries(lambda test=test: self._program(submission, test))
            if program.error is not None:
                return CodeVerdict(0, "compile_error", backend, message=program.error)
            result = await _with_retries(lambda test=test, program=program: self._test(submission, program, test))
            results.append(result)
            if result.reason != "correct":
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
        reason = _failure_reason(outcome, submission)
        if reason is None:
            reason = "correct" if await self._is_correct(submission, test, outcome) else "wrong"
        shown = (text[:KEPT].decode(errors="replace") for text in (outcome.stdout, outcome.stderr))
        return RunResult(reason, outcome.cpu_seconds, outcome.wall_seconds, outcome.memory_mb, *shown)

    async def _run(self, submission: Submission, program: Program, test: Test) -> Outcome:
        argv, binds = program.argv, program.binds
        if isinstance(test, CallTest):
            row = {"source": submission.source, "call": test.call, "args": test.args}
            return await self.executor.run(Job(argv, submission.limits, binds), json.dumps(row).encode())
        if isinstance(test, AssertTest):
            return await self.executor.run(Job(argv, submission.limits, binds))
        if not submission.files:
            return await self.executor.run(Job(argv, submission.limits, binds), to_bytes(test.input))
        read, written = submission.files
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            (Path(folder) / "input").write_bytes(to_bytes(test.input))
            argv = ("/bin/sh", "-c", _FILE_MODE, "sh", written, *argv)
            binds = (*binds, (f"{folder}/input", f"{WORK}/{read}"))
            return await self.executor.run(Job(argv, submission.limits, binds))

    async def _is_correct(self, submission: Submission, test: Test, outcome: Outcome) -> bool:
        if isinstance(test, CallTest):
            returned, value = decode_value(outcome.stdout)
            return returned and same_value(test.expected, value)
        if isinstance(test, AssertTest):
            return _end_mark(submission, test).encode() in outcome.stdout
        if submission.checker:
            return await self._run_checker(submission.checker, test, outcome.stdout)
        same = same_lines if submission.compare == "lines" else same_tokens
        return same(test.output, outcome.stdout.decode(errors="surrogateescape"))

    async def _run_checker(self, checker: Checker, test: StdioTest, output: bytes) -> bool:
        """Run the checker, in a sandbox too. A checker that fails on an output rejects it."""
        program = await self.programs.get(checker.language, checker.source)
        if program.error is not None:
            raise GraderError(f"the checker does not compile: {program.error}")
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for name, text in (("input", to_bytes(test.input)), ("output", output), ("correct", to_bytes(test.output))):
                (Path(folder) / name).write_bytes(text)
            argv = (*program.argv, *(f"{_DATA}/{name}" for name in ("input", "correct", "output")))
            outcome = await self.executor.run(Job(argv, _CHECKER_LIMITS, (*program.binds, (folder, _DATA))))
        if outcome.stopped or outcome.code:
            return False
        words = outcome.stdout.split()
        if len(words) != 1 or not words[0].replace(b".", b"", 1).isdigit():
            raise GraderError(f"the checker printed {outcome.stdout[:80]!r}; it must print a score (1 or 100 passes)")
        return words[0] in (b"1", b"100")


def to_bytes(text: str) -> bytes:
    """Encode as UTF-8, restoring bytes kept by `surrogateescape`."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="replace")


def _end_mark(submission: Submission, test: AssertTest) -> str:
    """Return the text printed after the last assertion, which an early `sys.exit()` skips."""
    return hashlib.sha256(f"{submission.source}\0{test.program}".encode(errors="surrogatepass")).hexdigest()


def _failure_reason(outcome: Outcome, submission: Submission) -> Reason | None:
    """Return why a run failed; None if it exited normally, so that its output counts."""
    if outcome.stopped:
        return outcome.stopped
    if outcome.cpu_seconds > submission.limits.time or outcome.code == _SIGXCPU:
        return "timeout"
    if outcome.code == 0:
        return None
    if outcome.code == _SIGXFSZ:
        return "output_limit"
    last_line = outcome.stderr.strip().rpartition(b"\n")[2]
    if submission.language == "python" and outcome.code == 1 and last_line.startswith(_COMPILE_ERRORS):
        return "compile_error"
    return "memory" if any(word in outcome.stderr for word in _OUT_OF_MEMORY) else "runtime_error"


async def _with_retries(attempt: Callable[[], Awaitable[T]]) -> T:
    """Retry while the sandbox fails. Raises: GraderError after the last try."""
    for number in range(1, _NUM_TRIES + 1):
        try:
            return await attempt()
        except SandboxFailure as failure:
            if number == _NUM_TRIES:
                raise GraderError(f"{number} tries failed; the last: {failure}") from failure
    raise AssertionError
