"""Suite of benchmarks in one evaluation, as in table 1: metrics are reported per benchmark and averaged."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sdzero.tasks.base import Task
from sdzero.types import Question, Split, Verdict

ListQuestions = Callable[[Split, int | None], list[Question]]


class Suite(Task):
    """Held-out questions of several tasks, one task after the other, each verified by its own task.

    Ids are `NAME/` and the task's own id.

    Args:
        benchmarks: task by name. Names consist of letters, digits, `_` and `-`.
        num_questions: maximum number of questions per benchmark, one number or by name; 0 skips a benchmark; null
            takes all, which a task that generates questions endlessly refuses.
    """

    def __init__(self, benchmarks: dict[str, Task], num_questions: dict[str, int] | int | None = None) -> None:
        if not benchmarks:
            raise ValueError("task.benchmarks is empty: name at least one, NAME: {class_path: ...}")
        if invalid := [name for name in benchmarks if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
            raise ValueError(f"task.benchmarks: invalid name {invalid[0]!r}: use letters, digits, _ and -")
        limits = num_questions if isinstance(num_questions, dict) else dict.fromkeys(benchmarks, num_questions)
        if unknown := limits.keys() - benchmarks.keys():
            raise ValueError(f"task.num_questions names {sorted(unknown)}, but the benchmarks are {[*benchmarks]}")
        for name, limit in limits.items():
            if limit is not None and limit < 0:
                raise ValueError(f"task.num_questions of {name!r} must be non-negative or null, got {limit}")
        self.benchmarks, self.limits = benchmarks, limits

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        return self._concatenate(split, num_questions, lambda task: task.questions)

    def ungraded_questions(self, split: Split, num_questions: int | None) -> list[Question]:
        return self._concatenate(split, num_questions, lambda task: task.ungraded_questions)

    def _concatenate(self, split: Split, num: int | None, method: Callable[[Task], ListQuestions]) -> list[Question]:
        if split != "eval":
            raise ValueError(f"a suite of benchmarks is for evaluation and has no split {split!r}: train on a task")
        questions = [
            replace(question, id=f"{name}/{question.id}", family=question.identity)  # the identity used in training
            for name, task in self.benchmarks.items()
            if self.limits.get(name) != 0
            for question in _first(method(task), self.limits.get(name))
        ]
        if num is not None and num > len(questions):
            raise ValueError(f"num_questions={num}, but the suite holds only {len(questions)}: request fewer, or null")
        return questions[:num]

    def verify(self, question: Question, response: str) -> Verdict:
        return self.benchmarks[question.benchmark].verify(_inner(question), response)

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        for name, task in self.benchmarks.items():
            places = [i for i, (question, _) in enumerate(answers) if question.benchmark == name]
            own = [(_inner(answers[i][0]), answers[i][1]) for i in places]
            verdicts |= zip(places, task.verify_all(own) if own else (), strict=True)
        return [verdicts[i] for i in range(len(answers))]

    def exclusions(self) -> dict[str, Any]:
        """Return the exclusions of each benchmark, by name."""
        return {name: task.exclusions() for name, task in self.benchmarks.items()}

    def statement(self, question: Question) -> str:
        return self.benchmarks[question.benchmark].statement(_inner(question))


def _inner(question: Question) -> Question:
    """Return the question as its own task made it."""
    own_id = question.id.partition("/")[2]
    return replace(question, id=own_id, family="" if question.family == own_id else question.family)


def _first(list_questions: ListQuestions, limit: int | None) -> list[Question]:
    """Return the first `limit` held-out questions of a benchmark, or all if there are fewer."""
    try:
        return list_questions("eval", None)[:limit]
    except ValueError:
        if limit is None:
            raise
        return list_questions("eval", limit)  # an endless task; faulty data raises again
