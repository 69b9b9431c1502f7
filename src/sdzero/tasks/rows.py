"""Questions of one's own: rows of a JSONL, JSON or parquet file. The verifier is the subclass's."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from sdzero.tasks.base import Task
from sdzero.tasks.splits import split_of
from sdzero.types import Question, Split

log = logging.getLogger(__name__)

_JSONL = "expected one JSON object a line, or one list of objects"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file: parquet by its name, else JSON, one object a line or one list of objects.

    JSON is read value by value: a table's column types, which are guessed, would turn a gold answer 3 that stands
    above a 2.5 into 3.0, and the text 2020-01-01 into a time.

    Raises:
        FileNotFoundError, ValueError: names the file, and the line or row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"task.path: no file {path} (seen from {Path.cwd()})")
    if path.suffix == ".parquet":
        return _parquet(path)
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the mark that some editors begin a file with
    rows: list[dict[str, Any]] = []
    for number, text in [(1, raw)] if raw.lstrip().startswith(b"[") else enumerate(raw.splitlines(), 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is no JSON ({error}): {_JSONL}") from None
        rows += value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} is no JSON object: {_JSONL}")
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {error}") from None
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            try:
                json.dumps(value)
            except TypeError as error:  # a question goes through JSON between the stages
                raise ValueError(
                    f"{path}: row {number}: column {column!r}: {error}: make it text, or leave the column out"
                ) from None
    return rows


class Rows(Task):
    """Questions from a file with columns of any names; a subclass adds `verify`.

    Every other column stands in the question's `meta`. Rows that repeat a question, and rows that no verifier could
    grade, are left out, with a warning; `dropped` says of each of the latter where it stands, and why.

    Args:
        path: the file, whose questions are dealt out by their hash: 40% phase1, 40% phase2, 20% eval; or a file for
            each split: `{phase1: ..., phase2: ..., eval: ...}`.
        question_column: column of the question's text.
        answer_column: column of the gold answer; a number becomes text. Null where the verifier needs none.
        id_column: column that names the question; null takes a hash of its text.
        max_dropped_share: share of the questions, between 0 and 1, that may be ungradable before that is an error.
    """

    def __init__(
        self,
        path: str | dict[Split, str],
        question_column: str = "question",
        answer_column: str | None = "answer",
        id_column: str | None = None,
        max_dropped_share: float = 0.05,
    ) -> None:
        if isinstance(path, Mapping) and {*path} != {*get_args(Split)}:
            raise ValueError(f"task.path: needs one file, or a file for each of {get_args(Split)}; got {[*path]}")
        if not 0 <= max_dropped_share <= 1:
            raise ValueError(f"task.max_dropped_share must lie in [0, 1], got {max_dropped_share}")
        self.path = path
        self.question_column, self.answer_column, self.id_column = question_column, answer_column, id_column
        self.max_dropped_share = max_dropped_share
        self.dropped: list[tuple[str, str]] = []

    def ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        """Why questions cannot be graded, by their ids: every response to them would be wrong.

        Override it where a row may lack what the verifier compares with. It gets all questions at once.
        """
        return {}

    def questions(self, split: Split, num_questions: int) -> list[Question]:
        questions = [question for of, question in self._all if of == split][:num_questions]
        if len(questions) < num_questions:
            raise ValueError(
                f"num_questions={num_questions}, but split {split!r} of {self.path} holds only {len(questions)}: "
                "ask for fewer, or add rows"
            )
        return questions

    @cached_property
    def _all(self) -> list[tuple[Split, Question]]:
        """The distinct questions of all files, each with its split.

        Raises:
            ValueError: two questions share an id, or two files a question; too many are ungradable.
        """
        texts: dict[str, tuple[Split | None, str]] = {}
        ids: dict[str, str] = {}
        questions: list[tuple[Split, Question]] = []
        repeats: list[str] = []
        files = self.path if isinstance(self.path, dict) else {None: self.path}
        for split, path in files.items():
            for row, question in self._read(Path(path)):
                of, first = texts.setdefault(question.text, (split, row))
                if of != split:
                    raise ValueError(f"{row} asks what {first} asks: a question belongs to one split only")
                if first != row:
                    repeats.append(f"{row} repeats {first}")
                elif (first := ids.setdefault(question.id, row)) != row:
                    raise ValueError(f"{row} has the id of {first} ({question.id!r}), but asks another question")
                else:
                    questions.append((split or split_of(question.text), question))
        if repeats:
            log.warning("left out %d rows that repeat a question, e.g. %s", len(repeats), repeats[0])
        reasons = self.ungradable([question for _, question in questions])
        self._drop([(row, reasons[id]) for id, row in ids.items() if id in reasons], len(ids))
        return [(of, question) for of, question in questions if question.id not in reasons]

    def _drop(self, dropped: list[tuple[str, str]], num_questions: int) -> None:
        """Keeps and reports what was left out. Raises: ValueError if that is too much."""
        self.dropped = dropped
        if not dropped:
            return
        said = f"{len(dropped)} of {num_questions} questions that cannot be graded, e.g. {': '.join(dropped[0])}"
        if len(dropped) > self.max_dropped_share * num_questions:
            raise ValueError(
                f"{self.path} has {said}: mend them, take them out, or allow more than "
                f"task.max_dropped_share={self.max_dropped_share}"
            )
        log.warning("left out %s", said)

    def _read(self, path: Path) -> Iterator[tuple[str, Question]]:
        """(where it stands, question) of every row. Raises: ValueError naming the column or the row."""
        rows = read_rows(path)
        found = sorted({column for row in rows for column in row})
        for key in ("question_column", "answer_column", "id_column"):
            if (column := getattr(self, key)) is not None and column not in found:
                raise ValueError(f"task.{key}: {path} has no column {column!r}; it has {found}")
        needed = [c for c in (self.question_column, self.answer_column, self.id_column) if c is not None]
        empty = [(n, c) for n, row in enumerate(rows, 1) for c in needed if not _text(path, n, c, row.get(c))]
        if empty:
            number, column = empty[0]
            raise ValueError(
                f"{path}: {len({n for n, _ in empty})} of {len(rows)} rows lack a value, the first is row {number} "
                f"(column {column!r}): fill them in, or take them out"
            )
        for number, row in enumerate(rows, 1):
            cells = {column: _text(path, number, column, row[column]) for column in needed}
            text = cells[self.question_column]
            answer = cells[self.answer_column] if self.answer_column is not None else ""
            name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            if self.id_column is not None:
                name = cells[self.id_column]
            meta = {column: value for column, value in row.items() if column not in needed}
            yield f"{path}: row {number}", Question(f"{type(self).__name__.lower()}/{name}", text, answer, meta)


def _text(path: Path, number: int, column: str, value: Any) -> str:
    """A cell without the white space around it; empty for what JSON and parquet write where there is nothing."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(
            f"{path}: row {number}: column {column!r} is a {type(value).__name__}: it must be text or a number"
        )
    return str(value).strip()
