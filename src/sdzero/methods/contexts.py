"""Teacher contexts: the token ids that a teacher reads before the copy of y that it scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from sdzero.prompts import PromptBuilder
from sdzero.types import ScoredRollout, TeacherContext


class Context(ABC):
    """Builder of teacher contexts. One class per system of the paper's table 2."""

    @abstractmethod
    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        """Return the context for one response; `siblings` are all responses of the batch to the same question."""

    def max_extra_tokens(self, builder: PromptBuilder, max_new_tokens: int) -> int:
        """Return an upper bound of the tokens added to the prompt; 0 if it is not known in advance."""
        return 0


class Plain(Context):
    """The prompt alone: on-policy distillation from another model."""

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        return TeacherContext(scored.rollout.prompt.token_ids)


class Revision(Context):
    """SD-Zero's reviser: prompt + body(y) + bridge(r), equation 4."""

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        return TeacherContext(builder.revision_prompt(scored).token_ids)

    def max_extra_tokens(self, builder: PromptBuilder, max_new_tokens: int) -> int:
        return max_new_tokens + builder.max_bridge_len


class FinalAnswer(Context):
    """Only the gold answer beside the question (table 8).

    Args:
        template: user message with the fields {question} and {answer}.
    """

    def __init__(self, template: str = "{question}\n\nThe correct final answer is: {answer}") -> None:
        self.template = template

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        question = scored.rollout.prompt.question
        return TeacherContext(builder.chat(self.template.format(question=question.text, answer=question.answer)))
