"""Programming questions of one's own rows: the program in a response is run against tests, in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdzero.graders.sandbox.client import SandboxClient, check
from sdzero.graders.sandbox.types import (
    AssertTest,
    Checker,
    Compare,
    Language,
    Limits,
    StdioTest,
    Submission,
    Test,
    read_test,
)
from sdzero.tasks.boxed import after_thought
from sdzero.tasks.files import Row
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.rows import Rows, SetAside
from sdzero.tasks.splits import Sizes
from sdzero.types import Question, Split, Verdict

LIMITS = Limits()
_NAMES: dict[Language, set[str]] = {"cpp": {"cpp", "c++", "cc", "cxx"}, "python": {"python", "python3", "py"}}
_CALLED: dict[Language, str] = {"cpp": "C++17", "python": "Python 3"}
_FILES = ("input.txt", "output.txt")  # of Codeforces' questions whose input_mode is file
_FENCE = re.compile(r"( {0,3})(`{3,})([^`]*)")
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)
_AT_ONCE = 2**28  # characters of tests that one request to the judge holds, give or take those of one question


class Code(Rows):
    """Questions of a file that are answered with a program, as in open-r1/codeforces.

    The last closed fenced block of the language is the program, and it is right if it passes all tests of its row.
    Rows without tests that can be run are left out, with a warning; they stand in `dropped`. So are rows whose
    official_tests, taken as the tests, are not all there (official_tests_complete). Interactive problems
    (interaction_format) are set aside.

    A row may also have these columns: language (`cpp` or `python`), time_limit (seconds of CPU time on one test),
    memory_limit (MiB), generated_checker (a Python program `checker input correct output`, which prints 1 for a right
    output), input_mode (`stdio`, or `file` for input.txt and output.txt) and starter_code (shown behind the question).

    Args:
        path: as in Rows.
        question_column: as in Rows.
        tests_column: column of the tests, a list or its JSON: `{input, output}`; for Python also
            `{call, args, expected}` and `{program}`, which holds assertions.
        id_column: as in Rows.
        max_dropped_share: as in Rows.
        language: `cpp` or `python`, where the row does not say.
        limits: what one run may use where its row does not say.
        compare: how outputs are compared without a checker: `tokens`, or `lines` as LiveCodeBench does.
        allow_assertions: trains on `{program}` tests. A response can forge these, e.g. by ending the process, and
            training finds out; without it they are for evaluation only.
        backend: the judge's sandbox; `auto` takes the first that holds.
        num_workers: programs that run at a time; null takes one per core.
        python: interpreter in the sandbox, below /usr; null takes the system's python3.
        sizes: as in Rows.

    Raises:
        sdzero.graders.errors.NoSandboxError: no sandbox holds here.
    """

    def __init__(
        self,
        path: str | HubDataset | dict[Split, str | HubDataset],
        question_column: str = "question",
        tests_column: str = "tests",
        id_column: str | None = None,
        max_dropped_share: float = 0.05,
        language: Language = "cpp",
        limits: Limits = LIMITS,
        compare: Compare = "tokens",
        allow_assertions: bool = False,
        backend: str = "auto",
        num_workers: int | None = None,
        python: str | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        super().__init__(path, question_column, None, id_column, max_dropped_share, sizes)
        if language not in _NAMES:
            raise ValueError(f"task.language must be one of {[*_NAMES]}, got {language!r}")
        self.language: Language = language
        self.compare: Compare = compare
        self.tests_column, self.limits, self.allow_assertions = tests_column, limits, allow_assertions
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._submissions: dict[str, Submission] = {}
        self._sandbox = SandboxClient(
            backend, num_workers, python
        )  # now: its process must not be forked from one that holds CUDA

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        questions = super().questions(split, num_questions)
        kinds = ((q.id, self._submissions[q.id].tests[:1]) for q in questions)
        forgeable = [id for id, tests in kinds if any(isinstance(test, AssertTest) for test in tests)]
        if forgeable and split != "eval" and not self.allow_assertions:
            raise ValueError(
                f"{len(forgeable)} questions of split {split!r} of {self.name} are tested by assertions, e.g. "
                f"{forgeable[0]}: a response can forge these, and training would find out. Give calls with what they "
                "must return, or accept the risk with task.allow_assertions: true"
            )
        return questions

    def verify(self, question: Question, response: str) -> Verdict:
        return self.verify_all([(question, response)])[0]

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        _ = self._all  # has the rows read
        for question, _ in answers:
            if question.id not in self._submissions:
                raise ValueError(f"{self.name} has no tests for question {question.id}")
        verdicts: list[Verdict] = []
        for batch in self._batches(answers):
            submissions = [submission for submission in batch if submission is not None]
            judged = iter(self._sandbox.grade(submissions) if submissions else ())
            for submission in batch:
                if submission is None:
                    verdicts.append(Verdict(0, "unparseable"))
                else:
                    verdict = next(judged)
                    verdicts.append(Verdict(verdict.reward, verdict.reason, submission.source))
        return verdicts

    def _batches(self, answers: Sequence[tuple[Question, str]]) -> Iterator[list[Submission | None]]:
        """What the answers submit, in order, None without a program; as many at a time as their tests allow."""
        batch: list[Submission | None] = []
        tests: dict[str, tuple[Test, ...]] = {}  # by question: the judge gets the tests of all its answers once
        size = 0
        for question, response in answers:
            program = self.program(question, response)
            if program is None:
                batch.append(None)
                continue
            if question.id not in tests:
                if size > _AT_ONCE:
                    yield batch
                    batch, tests, size = [], {}, 0
                tests[question.id] = self.tests(question)
                size += sum(len(test.input + test.output) for test in tests[question.id] if isinstance(test, StdioTest))
            batch.append(replace(self._submissions[question.id], source=program, tests=tests[question.id]))
        yield batch

    def program(self, question: Question, response: str) -> str | None:
        """The program that a response holds; None: it holds none."""
        return last_block(after_thought(response), self._submissions[question.id].language)

    def tests(self, question: Question) -> tuple[Test, ...]:
        """The tests of a question. Override it where they are too many to be held for all questions."""
        return self._submissions[question.id].tests

    def prepare(self, row: Row) -> Sequence[Row]:
        if str(row.get("interaction_format") or "").strip():
            raise SetAside("the problem is interactive")
        if self.tests_column == "official_tests" and row.get("official_tests_complete") is False:
            raise ValueError("its official_tests are not all there, or are cut: official_tests_complete is false")
        return super().prepare(row)

    def ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for question in questions:
            try:
                self._submissions[question.id] = self._submission(question, self._rows.pop(question.id))
            except ValueError as error:
                reasons[question.id] = str(error)
        return reasons

    def _question(self, row: Row) -> Question:
        question = super()._question(row)
        meta = dict(question.meta)
        self._rows.setdefault(question.id, dict(meta))
        for column in (self.tests_column, "generated_checker"):
            meta.pop(column, None)  # each trace of a question carries its meta, and tests have megabytes
        return replace(question, meta=meta)

    def asked(self, question: Question) -> str:
        """Statement, limits, then one fenced block: the form in which the field asks for programs."""
        submission = self._submissions[question.id]
        limits = submission.limits
        parts = [question.text, f"Time limit per test: {limits.time:g} s. Memory limit: {limits.memory_mb:g} MB."]
        if submission.files:
            read, written = submission.files
            parts.append(f"The program reads its input from {read} and writes its output to {written}.")
        language = submission.language
        if starter := question.meta.get("starter_code"):
            parts.append(f"Start from this code:\n```{language}\n{str(starter).rstrip()}\n```")
        parts.append(f"Write the whole program in {_CALLED[language]}, in one block fenced by ```{language} and ```.")
        return "\n\n".join(parts)

    def _submission(self, question: Question, row: Mapping[str, Any]) -> Submission:
        """What a question's programs are held against, still without one. It may lack tests that `tests` gets.

        Raises: ValueError that says what is amiss.
        """
        if self.tests_column not in row:
            raise ValueError(f"it has no column {self.tests_column!r}")
        submission = replace(self._frame(row), tests=parse_tests(row[self.tests_column]))
        check(submission)
        return submission

    def _frame(self, row: Mapping[str, Any]) -> Submission:
        """A submission without program and tests. Raises: ValueError that says what is amiss."""
        language = row.get("language") or self.language
        if language not in _NAMES:
            raise ValueError(f"language is {language!r}: it must be one of {[*_NAMES]}")
        mode = row.get("input_mode") or "stdio"
        if mode not in ("stdio", "file"):
            raise ValueError(f"input_mode is {mode!r}: it must be stdio or file")
        time, memory_mb = self._limit(row, "time_limit", "time"), self._limit(row, "memory_limit", "memory_mb")
        checker = row.get("generated_checker")
        return Submission(
            language,
            "",
            (),
            replace(self.limits, time=time, memory_mb=memory_mb),
            self.compare,
            Checker("python", str(checker)) if checker else None,
            _FILES if mode == "file" else None,
        )

    def _limit(self, row: Mapping[str, Any], column: str, name: str) -> float:
        limit = row.get(column)
        if limit is None or limit != limit:  # as parquet has what is missing
            return getattr(self.limits, name)
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            raise ValueError(f"{column} is {limit!r}: it must be a number")
        return limit


def parse_tests(cell: Any) -> tuple[Test, ...]:
    """The tests in a cell: a list of objects, or the JSON of one. Raises: ValueError that says what is amiss."""
    if isinstance(cell, str) and (cell := cell.strip()):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its tests are no JSON: {error}") from None
    if not cell:
        raise ValueError("it has no tests")
    if not isinstance(cell, list) or not all(isinstance(row, dict) for row in cell):
        raise ValueError("its tests are no list of objects")
    tests: list[Test] = []
    for number, row in enumerate(cell, 1):
        for key, value in row.items():
            kind = list if key == "args" else str
            if key != "expected" and not isinstance(value, kind):
                raise ValueError(f"test {number}: {key!r} is no {'list' if kind is list else 'text'}")
        try:
            tests.append(read_test(row))
        except ValueError as error:
            raise ValueError(f"test {number}: {error}") from None
    return tuple(tests)


def last_block(text: str, language: Language) -> str | None:
    """The program in the last closed fenced block of a language; one that names none counts where it is the last."""
    for number, (name, source) in enumerate(reversed([*_closed_blocks(text)])):
        if name in _NAMES[language] or (not name and number == 0):
            return source
    return None


def _closed_blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block, in one pass over the lines. One without an end was cut off."""
    fence, indent, name = "", 0, ""
    lines: list[str] = []
    for line in text.split("\n"):
        found = _FENCE.fullmatch(line.rstrip())
        if found and (found[3] or not fence):  # a named one within a block: that block was given up
            indent, fence, name = len(found[1]), found[2], (found[3].split() or [""])[0].lower()
            lines = []
        elif found and len(found[2]) >= len(fence):
            yield name, "\n".join(lines) + "\n"
            fence = ""
        else:
            lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])


def with_preamble(preamble: str, program: str) -> str:
    """A Python program behind lines of ours; what it imports from __future__ goes first, where Python wants it."""
    return "\n".join([*_FUTURE.findall(program), preamble, _FUTURE.sub("", program)])
