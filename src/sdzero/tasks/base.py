"""A task: questions of one domain, and the verifier that turns a response into a binary reward."""

from __future__ import annotations

from abc import ABC, abstractmethod

from sdzero.types import Question, Split, Verdict


class Task(ABC):
    """One domain. Add a task by adding a file with a subclass; `class_path` is the registry."""

    @abstractmethod
    def questions(self, split: Split, num_questions: int) -> list[Question]:
        """The first `num_questions` of a split, always the same ones in the same order.

        Splits never share a question id or a question text.

        Raises:
            ValueError: the split holds fewer questions than asked for.
        """

    @abstractmethod
    def verify(self, question: Question, response: str) -> Verdict:
        """The verdict on a finished response's text (without its end-of-turn token).

        A fault of the machinery raises; it is never a reward of 0. Responses that were cut at the
        token limit never get here: they are `truncated`.
        """
