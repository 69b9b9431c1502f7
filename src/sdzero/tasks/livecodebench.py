"""LiveCodeBench: dated contest problems, answered with a Python program or a class Solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import lru_cache
from typing import Any, Literal, get_args

from sdzero.graders.sandbox.livecodebench_tests import read_tests
from sdzero.graders.sandbox.types import Limits, Submission, Test, check_submission
from sdzero.tasks.code import Code, with_preamble
from sdzero.tasks.hub import HubDataset, Row, hub_files
from sdzero.tasks.rows import SetAside
from sdzero.tasks.sources import Source, read
from sdzero.types import Question, Split

Version = Literal["v1", "v2", "v3", "v4", "v5", "v6"]

LIVECODEBENCH = HubDataset(
    "livecodebench/code_generation_lite",
    split="test",
    revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505",  # as pinned in public code; not verified
)
FILES = ("test.jsonl", *(f"test{number}.jsonl" for number in range(2, 7)))
LIVECODEBENCH_LIMITS = Limits(time=6.0, memory_mb=1024.0)

_TESTS = ("public_test_cases", "private_test_cases", "metadata")
_COLUMNS = ("question_id", "question_content", "contest_date", "starter_code", *_TESTS)
_NUM_CACHED = 8  # questions whose tests stay in memory
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "json", "typing"),
)
PREAMBLE = "\n".join(
    [
        *(f"from {name} import *" for name in _MODULES),
        f"import sys, {', '.join(_MODULES)}",
        "from builtins import *",  # restores open, pow, compile and others
        "sys.setrecursionlimit(50_000)",
    ]
)
"""Prepended to each program, as in the benchmark: starter code uses types and functions it does not import."""
_FROM_STARTER = "Complete the starter code below, and give all of it in one block fenced like it."
_FROM_STDIN = (
    "Write a Python program that reads the input from standard input and writes the answer to standard output; do not "
    "run it on the examples. Give it in one block fenced like the one below."
)


class LiveCodeBench(Code):
    """LiveCodeBench's code generation problems; all are in split `eval`, unless `path` says otherwise.

    A program has 6 s per test; outputs are compared line by line, then as numbers. If a row names a function, the tests
    call it as a method of the class `Solution`.

    The tests of all problems are gigabytes, so they stay compressed until answers are graded. Loading decompresses each
    row's tests once, to drop rows with unreadable tests before anything is sampled: two minutes for all of v6.

    Args:
        path: the repository livecodebench/code_generation_lite, or a folder laid out like it, whose files `version`
            selects; else, with `version: null`, a copy in parquet, a file, or one source per split.
        version: `v1` to `v6`, the first 400, 511, 612, 713, 880 or 1,055 problems.
        since: first contest date, such as `2024-08-01`; null for no limit.
        until: last contest date; null for no limit.
        limits: limits of one run.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source] = LIVECODEBENCH,
        version: Version | None = "v6",
        since: str | None = None,
        until: str | None = None,
        limits: Limits = LIVECODEBENCH_LIMITS,
        **kwargs: Any,
    ) -> None:
        if version is not None and version not in get_args(Version):
            raise ValueError(f"task.version must be one of {[*get_args(Version)]}, or null, got {version!r}")
        if version and (not isinstance(path, HubDataset) or path.config):
            raise ValueError("task.version selects files of the benchmark's own repository: set null for another path")
        self.version: Version | None = version
        self.since, self.until = _date("since", since), _date("until", until)
        if self.since and self.until and self.since > self.until:
            raise ValueError(f"task.since={since} is later than task.until={until}: no problem lies between them")
        super().__init__(
            path if isinstance(path, Mapping) else {"eval": path},
            "tests",
            language="python",
            limits=limits,
            compare="lines",
            allow_assertions=False,
            question_column="question_content",
            id_column="question_id",
            sizes=None,
            **kwargs,
        )
        self._packed: dict[str, tuple[str, str, str]] = {}
        self._cached_tests = lru_cache(_NUM_CACHED)(lambda id: read_tests(*self._packed[id]))

    def load_rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        wanted = [*dict.fromkeys((*columns, *_COLUMNS))]
        if self.version is None:
            return super().load_rows(source, wanted)
        assert isinstance(source, HubDataset)
        # one by one: datasets refuses a repository with a loading script, such as this one
        files = hub_files(source, FILES[: get_args(Version).index(self.version) + 1])
        return [row for file in files for row in read(str(file), wanted)]

    def convert_row(self, row: Row) -> Sequence[Row]:
        if self.since or self.until:
            day = date.fromisoformat(str(row["contest_date"])[:10])
            if day < (self.since or day) or day > (self.until or day):
                raise SetAside("its contest_date is outside task.since and task.until")
        kept = ("question_id", "question_content", "starter_code", "contest_date", "platform", "difficulty")
        packed = tuple(row[column] for column in _TESTS)
        return [{**{column: row.get(column) for column in kept}, "tests": packed}]

    def dedup_key(self, question: Question) -> str:
        return question.id  # keep all published questions

    def prompt_text(self, question: Question) -> str:
        """Return the question in the format of the benchmark's own prompt."""
        starter = str(question.meta["starter_code"] or "").rstrip()
        instruction = _FROM_STARTER if starter else _FROM_STDIN
        return (
            f"### Question:\n{question.text}\n\n### Format: {instruction}\n"
            f"```python\n{starter or '# YOUR CODE HERE'}\n```\n\n### Answer:"
        )

    def program(self, question: Question, response: str) -> str | None:
        program = super().program(question, response)
        return None if program is None else with_preamble(PREAMBLE, program)

    def tests(self, question: Question) -> tuple[Test, ...]:
        return self._cached_tests(question.id)

    def _submission(self, question: Question, row: Mapping[str, Any]) -> Submission:
        for column, cell in zip(_TESTS, row["tests"], strict=True):
            if not isinstance(cell, str):
                raise ValueError(f"{column} is not a string")
        submission = self._template(row)
        check_submission(replace(submission, tests=read_tests(*row["tests"])))
        self._packed[question.id] = row["tests"]
        return submission


def _date(name: str, value: str | None) -> date | None:
    try:
        return None if value is None else date.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"task.{name} must be a date such as 2024-08-01, or null, got {value!r}") from None
