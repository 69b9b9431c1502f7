"""Questions of a file or of a data set of the hub: rows with columns of any names. The verifier is the subclass's."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

from sdzero.tasks.base import Task
from sdzero.tasks.files import Row
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.sources import read
from sdzero.tasks.splits import Sizes, deal, split_of
from sdzero.types import Question, Split

log = logging.getLogger(__name__)

Source = str | HubDataset


class SetAside(Exception):
    """A row that a task leaves out on purpose, and by a rule: the row has no fault."""


class Rows(Task):
    """Questions from a file or a data set with columns of any names; a subclass adds `verify`.

    Every other column stands in the question's `meta`. Rows that repeat a question, that lack something, or that no
    verifier could grade are left out, with a warning; `dropped` says of each of the latter where it stands, and why.
    `set_aside` counts the rows that a task does not ask by a rule of its own.

    Args:
        path: the file, JSONL, JSON or parquet, or a data set of the hub; its questions are dealt out by `sizes`, or,
            without, by their hash: 40% phase1, 40% phase2, 20% eval. Or one for each split:
            `{phase1: ..., phase2: ..., eval: ...}`, of which some may be left out.
        question_column: column of the question's text.
        answer_column: column of the gold answer; a number becomes text. Null where the verifier needs none.
        id_column: column that names the question; null takes a hash of its text.
        max_dropped_share: share of the rows, between 0 and 1, that may be dropped before that is an error.
        sizes: how many questions each split has.
    """

    def __init__(
        self,
        path: str | HubDataset | dict[Split, str | HubDataset],
        question_column: str = "question",
        answer_column: str | None = "answer",
        id_column: str | None = None,
        max_dropped_share: float = 0.05,
        sizes: Sizes | None = None,
    ) -> None:
        if isinstance(path, Mapping) and not {*path} <= {*get_args(Split)}:
            raise ValueError(f"task.path: needs one source, or one for each of {get_args(Split)}; got {[*path]}")
        if isinstance(path, Mapping) and sizes is not None:
            raise ValueError("task.sizes deals out the questions of one source: leave it out, or give one path")
        if not 0 <= max_dropped_share <= 1:
            raise ValueError(f"task.max_dropped_share must lie in [0, 1], got {max_dropped_share}")
        self.path = path
        self.question_column, self.answer_column, self.id_column = question_column, answer_column, id_column
        self.max_dropped_share = max_dropped_share
        self.sizes = sizes
        self.dropped: list[tuple[str, str]] = []
        self.set_aside: Counter[str] = Counter()
        self._where: dict[str, str] = {}  # question id -> where its row stands
        self._problems: dict[str, str | None] = {}  # question id -> why it cannot be graded
        self._statements: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Where its questions come from, for messages."""
        return ", ".join(map(str, self.path.values())) if isinstance(self.path, Mapping) else str(self.path)

    # --- what a task of rows may add ----------------------------------------------------------

    def columns(self) -> dict[str, str]:
        """The columns that the task cannot do without, by the key that names them."""
        keys = ("question_column", "answer_column", "id_column")
        return {f"task.{key}": column for key in keys if (column := getattr(self, key)) is not None}

    def rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        """The rows of a source in order, as `read` says."""
        return read(source, columns)

    def prepare(self, row: Row) -> Sequence[Row]:
        """The row as the task reads it, or as several questions.

        Raises:
            ValueError: it lacks something; says what. The row is dropped.
            SetAside: it is not one to be asked; says why.
        """
        return [row]

    def ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        """Why questions cannot be graded, by their ids: every response to them would be wrong.

        Override it where a row may lack what the verifier compares with. It gets many questions at once.
        """
        return {}

    def families(self, questions: Sequence[Question]) -> dict[str, str]:
        """The family of questions, by their ids, for those that do not stand alone."""
        return {}

    def key(self, question: Question) -> str:
        """What two rows have in common that ask the same question: one of them is left out."""
        return question.text

    def asked(self, question: Question) -> str:
        """The text as the model is to read it, made from the row's."""
        return question.text

    # --- questions ----------------------------------------------------------------------------

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        there = [question for of, question in self._all if of == split]
        questions = there[:num_questions]
        if num_questions is None or len(questions) == num_questions:
            return questions
        if self.sizes is not None and num_questions <= self.sizes.of(split):
            log.warning("split %s of %s has %d questions, not %d", split, self.name, len(there), num_questions)
            return questions
        raise ValueError(
            f"num_questions={num_questions}, but split {split!r} of {self.name} holds only {len(there)}: "
            "ask for fewer, or add rows"
        )

    def left_out(self) -> dict[str, Any]:
        """`dropped`: where a row stands -> its fault; `set_aside`: the rule -> number of rows."""
        return {"dropped": dict(self.dropped), "set_aside": dict(self.set_aside)}

    def statement(self, question: Question) -> str:
        return self._statements.get(question.id, question.text)

    @cached_property
    def _all(self) -> list[tuple[Split, Question]]:
        """The distinct, gradable questions of all sources, each with its split.

        Raises:
            ValueError: two questions share an id, or two sources a question; too many are dropped.
        """
        splits = self._distinct()
        families = self.families([question for _, question in splits])
        all_ = [replace(question, family=families.get(question.id, "")) for _, question in splits]
        dealt: list[tuple[Split, Question]]
        if self.sizes is not None:
            dealt = deal(all_, self.sizes, self._gradable)
        else:
            kept = {question.id for question in self._gradable(all_)}
            by_hash: list[tuple[Split | None, Question]] = [(of, q) for (of, _), q in zip(splits, all_, strict=True)]
            dealt = [(of or split_of(q.family or q.text), q) for of, q in by_hash if q.id in kept]
        reasons = {id: reason for id, reason in self._problems.items() if reason}
        self._drop(
            [(self._where[id], reason) for id, reason in reasons.items()],
            len(self._problems),
            "questions that cannot be graded",
        )
        self._statements = {question.id: question.text for _, question in dealt}
        return [(of, replace(question, text=self.asked(question))) for of, question in dealt]

    def _gradable(self, questions: Sequence[Question]) -> list[Question]:
        new = [question for question in questions if question.id not in self._problems]
        reasons = self.ungradable(new)
        self._problems |= {question.id: reasons.get(question.id) for question in new}
        return [question for question in questions if self._problems[question.id] is None]

    def _distinct(self) -> list[tuple[Split | None, Question]]:
        texts: dict[str, tuple[Split | None, str]] = {}
        questions: list[tuple[Split | None, Question]] = []
        repeats: list[str] = []
        sources: Mapping[Any, Source] = self.path if isinstance(self.path, Mapping) else {None: self.path}
        for split, source in sources.items():
            for where, question in self._read(source):
                of, first = texts.setdefault(self.key(question), (split, where))
                if of != split:
                    raise ValueError(f"{where} asks what {first} asks: a question belongs to one split only")
                if first != where:
                    repeats.append(f"{where} repeats {first}")
                elif (first := self._where.setdefault(question.id, where)) != where:
                    raise ValueError(f"{where} has the id of {first} ({question.id!r}), but asks another question")
                else:
                    questions.append((split, question))
        if repeats:
            log.warning("left out %d rows that repeat a question, e.g. %s", len(repeats), repeats[0])
        return questions

    def _drop(self, dropped: list[tuple[str, str]], num: int, what: str) -> None:
        """Keeps and reports what was left out. Raises: ValueError if that is too much."""
        self.dropped += dropped
        if not dropped:
            return
        said = f"{len(dropped)} of {num} {what}, e.g. {': '.join(dropped[0])}"
        if len(dropped) > self.max_dropped_share * num:
            raise ValueError(
                f"{self.name} has {said}: mend them, take them out, or allow more than "
                f"task.max_dropped_share={self.max_dropped_share}"
            )
        log.warning("left out %s", said)

    def _read(self, source: Source) -> Iterator[tuple[str, Question]]:
        """(where it stands, question) of every row. Raises: ValueError naming the column, or too many faulty rows."""
        columns = self.columns()
        try:
            rows = self.rows(source, [*columns.values()])
        except ValueError as error:
            key = next((key for key, column in columns.items() if f"no column {column!r}" in str(error)), "task.path")
            raise ValueError(f"{key}: {error}") from None
        dropped: list[tuple[str, str]] = []
        questions: list[tuple[str, Question]] = []
        for number, row in enumerate(rows, 1):
            where = f"{source}: row {number}"
            try:
                questions += [(where, self._question(prepared)) for prepared in self.prepare(row)]
            except SetAside as rule:
                self.set_aside[str(rule)] += 1
            except ValueError as error:
                dropped.append((where, str(error)))
        self._drop(dropped, len(rows), "rows that lack something")
        yield from questions

    def _question(self, row: Row) -> Question:
        """Raises: ValueError naming the column that has no value."""
        named = [column for column in (self.question_column, self.answer_column, self.id_column) if column is not None]
        cells = {column: _text(column, row.get(column)) for column in named}
        text = cells[self.question_column]
        name = cells[self.id_column] if self.id_column is not None else _hash(text)
        answer = cells[self.answer_column] if self.answer_column is not None else ""
        meta = {column: value for column, value in row.items() if column not in named}
        return Question(f"{type(self).__name__.lower()}/{name}", text, answer, meta)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _text(column: str, value: Any) -> str:
    """A cell without the white space around it. Raises: ValueError for none, as JSON and parquet write it."""
    if value is None or value != value or not str(value).strip():
        raise ValueError(f"column {column!r} is empty")
    if not isinstance(value, str | int | float):
        raise ValueError(f"column {column!r} is a {type(value).__name__}: it must be text or a number")
    return str(value).strip()
