"""Programming questions from the user's own rows: the program in a response runs against tests in a sandbox."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdzero.graders.sandbox.client import SandboxClient
from sdzero.graders.sandbox.types import (
    AssertTest,
    Checker,
    Compare,
    Language,
    Limits,
    StdioTest,
    Submission,
    Test,
    check_submission,
    parse_tests,
)
from sdzero.tasks.boxed import strip_thinking
from sdzero.tasks.hub import Row
from sdzero.tasks.rows import Rows, SetAside
from sdzero.tasks.sources import Source
from sdzero.types import Question, Split, Verdict

LIMITS = Limits()
_TAGS: dict[Language, set[str]] = {"cpp": {"cpp", "c++", "cc", "cxx"}, "python": {"python", "python3", "py"}}
_DISPLAY_NAMES: dict[Language, str] = {"cpp": "C++17", "python": "Python 3"}
_FILES = ("input.txt", "output.txt")  # of Codeforces problems whose input_mode is file
_FENCE = re.compile(r"( {0,3})(`{3,})([^`]*)")
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)
_MAX_REQUEST = 2**28  # characters of tests per request to the sandbox, exceeded by at most one question's


class Code(Rows):
    """Questions answered with a program, as in open-r1/codeforces.

    The program is the last closed fenced block of the language; it is correct if it passes all tests of its row. Rows
    without runnable tests are dropped, with a warning, as are rows with incomplete official_tests
    (official_tests_complete) if these are the tests. Interactive problems (interaction_format) are set aside.

    Optional columns: language (`cpp` or `python`), time_limit (CPU seconds per test), memory_limit (MiB),
    generated_checker (a Python program `checker input correct output` that prints 1 for a correct output) and
    input_mode (`stdio`, or `file` for input.txt and output.txt).

    Args:
        path: as in Rows.
        tests_column: column of the tests, a list or its JSON: `{input, output}`; for Python also
            `{call, args, expected}` and `{program}`, which holds assertions.
        language: `cpp` or `python`, for rows without a language.
        limits: limits of one run, for rows without their own.
        compare: comparison of outputs without a checker: `tokens`, or `lines` as in LiveCodeBench.
        allow_assertions: train on `{program}` tests. A response can forge these, e.g. by exiting the process, and
            training will find out; without it they are for evaluation only.
        backend: sandbox backend; `auto` takes the first that passes its self-test.
        num_workers: number of programs that run at a time; null for one per core.
        python: interpreter in the sandbox, below /usr; null for the system's python3.

    Raises:
        sdzero.graders.errors.NoSandboxError: no sandbox works on this machine.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source],
        tests_column: str = "tests",
        language: Language = "cpp",
        limits: Limits = LIMITS,
        compare: Compare = "tokens",
        allow_assertions: bool = False,
        backend: str = "auto",
        num_workers: int | None = None,
        python: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, answer_column=None, **kwargs)
        if language not in _TAGS:
            raise ValueError(f"task.language must be one of {[*_TAGS]}, got {language!r}")
        self.language: Language = language
        self.compare: Compare = compare
        self.tests_column, self.limits, self.allow_assertions = tests_column, limits, allow_assertions
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._submissions: dict[str, Submission] = {}
        # now: it must not fork from a process that holds CUDA
        self._sandbox = SandboxClient(backend, num_workers, python)

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        questions = super().questions(split, num_questions)
        forgeable = [q.id for q in questions if any(isinstance(t, AssertTest) for t in self._submissions[q.id].tests)]
        if forgeable and split != "eval" and not self.allow_assertions:
            raise ValueError(
                f"{len(forgeable)} questions of split {split!r} of {self.name} are tested by assertions, e.g. "
                f"{forgeable[0]}: a response can forge these, and training will find out. Use tests with a call and "
                "its expected value, or accept the risk with task.allow_assertions: true"
            )
        return questions

    def verify(self, question: Question, response: str) -> Verdict:
        return self.verify_all([(question, response)])[0]

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        _ = self._all  # reads the rows
        for question, _ in answers:
            if question.id not in self._submissions:
                raise ValueError(f"{self.name} has no tests for question {question.id}")
        verdicts = [Verdict(0, "unparseable")] * len(answers)
        for batch in self._batches(answers):
            graded = self._sandbox.grade([*batch.values()])
            for (place, submission), verdict in zip(batch.items(), graded, strict=True):
                verdicts[place] = Verdict(verdict.reward, verdict.reason, submission.source)
        return verdicts

    def _batches(self, answers: Sequence[tuple[Question, str]]) -> Iterator[dict[int, Submission]]:
        """Yield the submissions of answers that hold a program, by place, as many as the size of their tests allows."""
        batch: dict[int, Submission] = {}
        tests: dict[str, tuple[Test, ...]] = {}  # by question: sent to the sandbox once for all its answers
        size = 0
        for place, (question, response) in enumerate(answers):
            program = self.program(question, response)
            if program is None:
                continue
            if question.id not in tests:
                if size > _MAX_REQUEST:
                    yield batch
                    batch, tests, size = {}, {}, 0
                tests[question.id] = self.tests(question)
                size += sum(len(test.input + test.output) for test in tests[question.id] if isinstance(test, StdioTest))
            batch[place] = replace(self._submissions[question.id], source=program, tests=tests[question.id])
        if batch:
            yield batch

    def program(self, question: Question, response: str) -> str | None:
        """Extract the program of a response; None if there is none."""
        return last_block(strip_thinking(response), self._submissions[question.id].language)

    def tests(self, question: Question) -> tuple[Test, ...]:
        """Return the tests of a question. Override it if memory cannot hold the tests of all questions."""
        return self._submissions[question.id].tests

    def convert_row(self, row: Row) -> Sequence[Row]:
        if str(row.get("interaction_format") or "").strip():
            raise SetAside("the problem is interactive")
        if self.tests_column == "official_tests" and row.get("official_tests_complete") is False:
            raise ValueError("its official_tests are incomplete or cut: official_tests_complete is false")
        return super().convert_row(row)

    def find_ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        faults: dict[str, str] = {}
        for question in questions:
            try:
                self._submissions[question.id] = self._submission(question, self._rows.pop(question.id))
            except ValueError as error:
                faults[question.id] = str(error)
        return faults

    def _question(self, row: Row) -> Question:
        question = super()._question(row)
        self._rows.setdefault(question.id, question.meta)
        large = (self.tests_column, "generated_checker")  # each trace carries its question's meta: tests are megabytes
        return replace(question, meta={name: cell for name, cell in question.meta.items() if name not in large})

    def prompt_text(self, question: Question) -> str:
        """Return the statement, the limits, then the request for one fenced block."""
        submission = self._submissions[question.id]
        limits, language = submission.limits, submission.language
        parts = [question.text, f"Time limit per test: {limits.time:g} s. Memory limit: {limits.memory_mb:g} MB."]
        if submission.files:
            input_file, output_file = submission.files
            parts.append(f"The program reads its input from {input_file} and writes its output to {output_file}.")
        name = _DISPLAY_NAMES[language]
        parts.append(f"Write the whole program in {name}, in one block fenced by ```{language} and ```.")
        return "\n\n".join(parts)

    def _submission(self, question: Question, row: Mapping[str, Any]) -> Submission:
        """Build the submission of a question, without a program, and without tests if `tests` loads them.

        Raises: ValueError for a malformed row.
        """
        if self.tests_column not in row:
            raise ValueError(f"it has no column {self.tests_column!r}")
        submission = replace(self._template(row), tests=parse_tests(row[self.tests_column]))
        check_submission(submission)
        return submission

    def _template(self, row: Mapping[str, Any]) -> Submission:
        """Build a submission without program and tests. Raises: ValueError if the row is malformed."""
        language = row.get("language") or self.language
        if language not in _TAGS:
            raise ValueError(f"language is {language!r}: it must be one of {[*_TAGS]}")
        mode = row.get("input_mode") or "stdio"
        if mode not in ("stdio", "file"):
            raise ValueError(f"input_mode is {mode!r}: it must be stdio or file")
        limits: dict[str, Any] = {}
        for column, name in (("time_limit", "time"), ("memory_limit", "memory_mb")):
            limit = row.get(column)
            if limit is None or limit != limit:  # parquet stores a missing number as NaN
                continue
            if isinstance(limit, bool) or not isinstance(limit, int | float):
                raise ValueError(f"{column} is {limit!r}: it must be a number")
            limits[name] = limit
        source = row.get("generated_checker")
        checker = Checker("python", str(source)) if source else None
        files = _FILES if mode == "file" else None
        return Submission(language, "", (), replace(self.limits, **limits), self.compare, checker, files)


def last_block(text: str, language: Language) -> str | None:
    """Return the last closed fenced block of a language; an untagged block counts only if it is the last of all."""
    for number, (tag, source) in enumerate(reversed([*_closed_blocks(text)])):
        if tag in _TAGS[language] or (not tag and number == 0):
            return source
    return None


def _closed_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield (language tag, content) of each closed fenced block, in one pass over the lines."""
    fence, indent, tag = "", 0, ""
    lines: list[str] = []
    for line in text.split("\n"):
        found = _FENCE.fullmatch(line.rstrip())
        if found and (found[3] or not fence):  # a tagged fence within a block: that block was abandoned
            indent, fence, tag = len(found[1]), found[2], (found[3].split() or [""])[0].lower()
            lines = []
        elif found and len(found[2]) >= len(fence):
            yield tag, "\n".join(lines) + "\n"
            fence = ""
        else:
            lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])


def with_preamble(preamble: str, program: str) -> str:
    """Prepend lines to a Python program, after its imports from __future__, which must come first."""
    return "\n".join([*_FUTURE.findall(program), preamble, _FUTURE.sub("", program)])
