"""SDPO: the teacher reads the verifier's feedback."""

from __future__ import annotations

from collections.abc import Sequence

from sdzero.methods.contexts import Context
from sdzero.prompts import PromptBuilder
from sdzero.types import ScoredRollout, TeacherContext


class Feedback(Context):
    """The verifier's feedback on y, and a correct response to the same question if there is one (SDPO).

    Args:
        template: user message with the fields {question} and {feedback}.
    """

    def __init__(self, template: str = "{question}\n\nFeedback on an earlier attempt: {feedback}") -> None:
        self.template = template

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        question, verdict = scored.rollout.prompt.question, scored.verdict
        parsed = "" if verdict.parsed is None else f" (answer read: {verdict.parsed})"
        feedback = f"{verdict.reason}{parsed}."
        success = next((s for s in siblings if s.verdict.reward and s.rollout is not scored.rollout), None)
        if success is not None:
            feedback += f"\nA correct attempt was:\n{success.rollout.text}"
        return TeacherContext(builder.chat(self.template.format(question=question.text, feedback=feedback)))
