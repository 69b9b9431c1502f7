"""Base class of tasks whose questions are rows of a file or of a Hub data set; subclasses add the verifier."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

from sdzero.tasks.base import Task
from sdzero.tasks.hub import Row
from sdzero.tasks.sources import Source, read
from sdzero.tasks.splits import Sizes, assign_splits, split_of
from sdzero.types import Question, Split

log = logging.getLogger(__name__)


class SetAside(Exception):
    """Raised for a valid row that a rule of the task excludes."""


class Rows(Task):
    """Questions from a file or a Hub data set with any column names; a subclass adds `verify`.

    Columns not named here become the question's `meta`. Duplicate, incomplete and ungradable rows are left out, with a
    warning; `dropped` holds the location and the fault of the latter two. `set_aside` counts the rows a rule of the
    task excludes.

    Args:
        path: JSONL, JSON or parquet file, or Hub data set, split by `sizes`, or without them by the hash of the
            question: 40% phase1, 40% phase2, 20% eval. Or one source per split, some of which may be missing:
            `{phase1: ..., phase2: ..., eval: ...}`.
        question_column: column of the question's text.
        answer_column: column of the gold answer; a number becomes text. Null if the verifier needs none.
        id_column: column of the question's id; null for a hash of its text.
        max_dropped_share: share of rows, between 0 and 1, that may be dropped before it is an error.
        sizes: number of questions per split.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source],
        question_column: str = "question",
        answer_column: str | None = "answer",
        id_column: str | None = None,
        max_dropped_share: float = 0.05,
        sizes: Sizes | None = None,
    ) -> None:
        if isinstance(path, Mapping) and not {*path} <= {*get_args(Split)}:
            raise ValueError(f"task.path: expected one source, or one for each of {get_args(Split)}; got {[*path]}")
        if isinstance(path, Mapping) and sizes is not None:
            raise ValueError("task.sizes splits a single source: remove it, or give one path")
        if not 0 <= max_dropped_share <= 1:
            raise ValueError(f"task.max_dropped_share must lie in [0, 1], got {max_dropped_share}")
        self.path = path
        self.question_column, self.answer_column, self.id_column = question_column, answer_column, id_column
        self.max_dropped_share, self.sizes = max_dropped_share, sizes
        self.instruction = ""
        self.dropped: list[tuple[str, str]] = []
        self.set_aside: Counter[str] = Counter()
        self._locations: dict[str, str] = {}  # question id -> source and row
        self._faults: dict[str, str | None] = {}  # question id -> why it cannot be graded
        self._statements: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The source or sources, for messages."""
        return ", ".join(map(str, self.path.values())) if isinstance(self.path, Mapping) else str(self.path)

    def required_columns(self) -> dict[str, str]:
        """Return the columns the task needs, by the config key that names each."""
        keys = ("question_column", "answer_column", "id_column")
        return {f"task.{key}": column for key in keys if (column := getattr(self, key)) is not None}

    def load_rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        """Return the rows of a source, in order."""
        return read(source, columns)

    def convert_row(self, row: Row) -> Sequence[Row]:
        """Return the row as the task needs it, or as several questions.

        Raises: ValueError for an incomplete or malformed row; SetAside for one that a rule of the task excludes.
        """
        return [row]

    def find_ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        """Return why questions cannot be graded, by id: any response would count as wrong. Called in large batches."""
        return {}

    def families(self, questions: Sequence[Question]) -> dict[str, str]:
        """Return the family, by id, of the questions that belong to one."""
        return {}

    def dedup_key(self, question: Question) -> str:
        """Return what duplicates have in common; only the first is kept."""
        return question.text

    def prompt_text(self, question: Question) -> str:
        """Return the text for the model: the row's text and the instruction, if the task has one."""
        return f"{question.text}\n\n{self.instruction}" if self.instruction else question.text

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        questions = [question for of, question in self._all if of == split]
        if num_questions is None or num_questions <= len(questions):
            return questions[:num_questions]
        if self.sizes is None or num_questions > getattr(self.sizes, split):
            raise ValueError(
                f"num_questions={num_questions}, but split {split!r} of {self.name} holds only {len(questions)}: "
                "request fewer, or add rows"
            )
        log.warning("split %s of %s has %d questions, not %d", split, self.name, len(questions), num_questions)
        return questions

    def exclusions(self) -> dict[str, Any]:
        """Return `dropped` (location -> fault) and `set_aside` (rule -> number of rows)."""
        return {"dropped": dict(self.dropped), "set_aside": dict(self.set_aside)}

    def statement(self, question: Question) -> str:
        return self._statements.get(question.id, question.text)

    @cached_property
    def _all(self) -> list[tuple[Split, Question]]:
        """The distinct, gradable questions of all sources, each with its split. Raises: ValueError naming the rows."""
        given = self._deduplicate()
        families = self.families([question for _, question in given])
        questions = [replace(question, family=families.get(question.id, "")) for _, question in given]
        assigned: list[tuple[Split, Question]]
        if self.sizes is not None:
            assigned = assign_splits(questions, self.sizes, self._keep_gradable)
        else:
            kept = {question.id for question in self._keep_gradable(questions)}
            pairs = zip(given, questions, strict=True)
            assigned = [(split or split_of(q.family or q.text), q) for (split, _), q in pairs if q.id in kept]
        faults = [(self._locations[id], fault) for id, fault in self._faults.items() if fault]
        self._drop(faults, len(self._faults), "questions that cannot be graded")
        self._statements = {question.id: question.text for _, question in assigned}
        return [(split, replace(question, text=self.prompt_text(question))) for split, question in assigned]

    def _keep_gradable(self, questions: Sequence[Question]) -> list[Question]:
        new = [question for question in questions if question.id not in self._faults]
        faults = self.find_ungradable(new)
        self._faults |= {question.id: faults.get(question.id) for question in new}
        return [question for question in questions if self._faults[question.id] is None]

    def _deduplicate(self) -> list[tuple[Split | None, Question]]:
        """Return the distinct questions, each with the split of its source (None: one source for all splits)."""
        first_seen: dict[str, tuple[Split | None, str]] = {}
        questions: list[tuple[Split | None, Question]] = []
        repeats: list[str] = []
        sources: Mapping[Any, Source] = self.path if isinstance(self.path, Mapping) else {None: self.path}
        for split, source in sources.items():
            for location, question in self._read_source(source):
                other_split, first = first_seen.setdefault(self.dedup_key(question), (split, location))
                if other_split != split:
                    raise ValueError(f"{location} repeats {first} of another split: a question belongs to one split")
                if first != location:
                    repeats.append(f"{location} repeats {first}")
                elif (first := self._locations.setdefault(question.id, location)) != location:
                    raise ValueError(f"{location} has the id of {first} ({question.id!r}), but another question")
                else:
                    questions.append((split, question))
        if repeats:
            log.warning("left out %d duplicate questions, e.g. %s", len(repeats), repeats[0])
        return questions

    def _drop(self, dropped: list[tuple[str, str]], num: int, kind: str) -> None:
        """Record and log dropped rows. Raises: ValueError if they are too many."""
        self.dropped += dropped
        if not dropped:
            return
        summary = f"{len(dropped)} of {num} {kind}, e.g. {': '.join(dropped[0])}"
        if len(dropped) > self.max_dropped_share * num:
            remedy = f"fix or remove them, or raise task.max_dropped_share={self.max_dropped_share}"
            raise ValueError(f"{self.name} has {summary}: {remedy}")
        log.warning("left out %s", summary)

    def _read_source(self, source: Source) -> list[tuple[str, Question]]:
        """Return (location, question) of each row. Raises: ValueError naming the column, or too many bad rows."""
        columns = self.required_columns()
        try:
            rows = self.load_rows(source, [*columns.values()])
        except ValueError as error:
            key = next((key for key, column in columns.items() if f"no column {column!r}" in str(error)), "task.path")
            raise ValueError(f"{key}: {error}") from None
        dropped: list[tuple[str, str]] = []
        questions: list[tuple[str, Question]] = []
        for number, row in enumerate(rows, 1):
            location = f"{source}: row {number}"
            try:
                questions += [(location, self._question(converted)) for converted in self.convert_row(row)]
            except SetAside as rule:
                self.set_aside[str(rule)] += 1
            except ValueError as error:
                dropped.append((location, str(error)))
        self._drop(dropped, len(rows), "incomplete or malformed rows")
        return questions

    def _question(self, row: Row) -> Question:
        """Build a question. Raises: ValueError naming the column that has no value."""
        named = [column for column in (self.question_column, self.answer_column, self.id_column) if column is not None]
        cells = {column: _cell_text(column, row.get(column)) for column in named}
        text = cells[self.question_column]
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        name = digest if self.id_column is None else cells[self.id_column]
        answer = "" if self.answer_column is None else cells[self.answer_column]
        meta = {column: value for column, value in row.items() if column not in named}
        return Question(f"{type(self).__name__.lower()}/{name}", text, answer, meta)


def _cell_text(column: str, value: Any) -> str:
    """Return a cell as stripped text. Raises: ValueError if it is missing, as in JSON (null) or parquet (NaN)."""
    if value is None or value != value or not str(value).strip():
        raise ValueError(f"column {column!r} is empty")
    if not isinstance(value, str | int | float):
        raise ValueError(f"column {column!r} is a {type(value).__name__}: it must be text or a number")
    return str(value).strip()
