"""OPSD, on-policy self-distillation from solutions: a method in one file, because only the teacher's context is new."""

from __future__ import annotations

from collections.abc import Sequence

from sdzero.prompts import Context, PromptBuilder
from sdzero.types import ScoredRollout, TeacherContext


class SeesSolution(Context):
    """The teacher reads the question with its worked solution, then the student's answer token by token.

    Args:
        template: user message with the fields {question} and {solution}.
        column: column of the questions' file that holds the solution.
    """

    def __init__(
        self, template: str = "{question}\n\nA correct solution:\n{solution}", column: str = "solution"
    ) -> None:
        self.template, self.column = template, column

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        question = scored.rollout.prompt.question
        if not question.meta.get(self.column):
            raise ValueError(f"question {question.id!r} has no solution in column {self.column!r}")
        text = self.template.format(question=question.text, solution=question.meta[self.column])
        return TeacherContext(builder.chat(text))
