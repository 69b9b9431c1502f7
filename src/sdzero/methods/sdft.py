"""SDFT and OPSD: the teacher reads a demonstration."""

from __future__ import annotations

from collections.abc import Sequence

from sdzero.methods.contexts import Context
from sdzero.prompts import PromptBuilder
from sdzero.types import ScoredRollout, TeacherContext


class Demonstration(Context):
    """A worked solution beside the question (SDFT, OPSD).

    Args:
        template: user message with the fields {question} and {demonstration}.
        meta_key: key of the question's `meta` that holds the solution; for a task of rows, a column.
    """

    def __init__(
        self,
        template: str = "{question}\n\nHere is a reference solution:\n{demonstration}\n\n"
        "After reading it, answer the question in your own words.",
        meta_key: str = "solution",
    ) -> None:
        self.template, self.meta_key = template, meta_key

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        question = scored.rollout.prompt.question
        if not question.meta.get(self.meta_key):
            raise ValueError(
                f"question {question.id!r} has no meta[{self.meta_key!r}]: the Demonstration context needs a solution; "
                "name the right meta_key, or use FinalAnswer or Revision"
            )
        filled = self.template.format(question=question.text, demonstration=question.meta[self.meta_key])
        return TeacherContext(builder.chat(filled))
