"""Several benchmarks in one evaluation, as in table 1: figures come out per benchmark and averaged."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sdzero.tasks.base import Task
from sdzero.types import Question, Split, Verdict

Ask = Callable[[Split, int | None], list[Question]]


class Suite(Task):
    """The held-out questions of several tasks, one after the other, each verified by its own.

    Ids are `NAME/` and the task's own id.

    Args:
        benchmarks: name -> task. Names are of letters, digits, `_` and `-`.
        num_questions: at most so many of each benchmark, its first; by name, of those named; 0 leaves a benchmark out;
            null takes all of them, which a task that makes questions without an end refuses.
    """

    def __init__(self, benchmarks: dict[str, Task], num_questions: dict[str, int] | int | None = None) -> None:
        if not benchmarks:
            raise ValueError("task.benchmarks is empty: name at least one, NAME: {class_path: ...}")
        if wrong := [name for name in benchmarks if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
            raise ValueError(f"task.benchmarks: {wrong[0]!r} is no name: take letters, digits, _ and -")
        limits = num_questions if isinstance(num_questions, dict) else dict.fromkeys(benchmarks, num_questions)
        if unknown := limits.keys() - benchmarks.keys():
            raise ValueError(f"task.num_questions names {sorted(unknown)}, but the benchmarks are {[*benchmarks]}")
        for name, limit in limits.items():
            if limit is not None and limit < 0:
                raise ValueError(f"task.num_questions of {name!r} must be at least 0, or null, got {limit}")
        self.benchmarks, self.limits = benchmarks, limits

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        return self._joined(split, num_questions, [(name, task.questions) for name, task in self.benchmarks.items()])

    def to_read(self, split: Split, num_questions: int | None) -> list[Question]:
        return self._joined(split, num_questions, [(name, task.to_read) for name, task in self.benchmarks.items()])

    def _joined(self, split: Split, num_questions: int | None, asked: Sequence[tuple[str, Ask]]) -> list[Question]:
        if split != "eval":
            raise ValueError(f"a suite of benchmarks is for evaluation, and has no split {split!r}: train on a task")
        questions = [
            replace(question, id=f"{name}/{question.id}", family=question.identity)  # the identity that training knows
            for name, ask in asked
            if self.limits.get(name) != 0
            for question in _first(ask, self.limits.get(name))
        ]
        if num_questions is not None and num_questions > len(questions):
            raise ValueError(
                f"num_questions={num_questions}, but the suite holds only {len(questions)}: ask for fewer, or null"
            )
        return questions[:num_questions]

    def verify(self, question: Question, response: str) -> Verdict:
        return self.benchmarks[question.benchmark].verify(_inner(question), response)

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        for name, task in self.benchmarks.items():
            places = [i for i, (question, _) in enumerate(answers) if question.benchmark == name]
            own = [(_inner(answers[i][0]), answers[i][1]) for i in places]
            verdicts |= zip(places, task.verify_all(own) if own else (), strict=True)
        return [verdicts[i] for i in range(len(answers))]

    def left_out(self) -> dict[str, Any]:
        """By benchmark, what it leaves out."""
        return {name: task.left_out() for name, task in self.benchmarks.items()}

    def statement(self, question: Question) -> str:
        return self.benchmarks[question.benchmark].statement(_inner(question))


def _inner(question: Question) -> Question:
    """The question as its own task made it."""
    own_id = question.id.partition("/")[2]
    return replace(question, id=own_id, family="" if question.family == own_id else question.family)


def _first(ask: Ask, limit: int | None) -> list[Question]:
    """The first `limit` held-out questions of a benchmark, or all where there are fewer."""
    try:
        return ask("eval", None)[:limit]
    except ValueError:
        if limit is None:
            raise
        return ask("eval", limit)  # without an end; what is wrong with the data is raised once more
