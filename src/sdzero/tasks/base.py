"""A task: questions of one domain, and the verifier that turns a response into a binary reward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdzero.types import Question, Split, Trace, Verdict

if TYPE_CHECKING:  # prompts imports torch, which grading does without
    from sdzero.prompts import PromptBuilder


class Task(ABC):
    """One domain. Add a task by adding a file with a subclass; `class_path` is the registry."""

    @abstractmethod
    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        """The first `num_questions` of a split, None: all of it; always the same ones in the same order.

        Splits never share a question's identity, nor its text. An id begins with the task's name and a slash.

        Raises:
            ValueError: the split holds fewer questions than asked for, or has no end and was asked for all.
        """

    def to_read(self, split: Split, num_questions: int | None) -> list[Question]:
        """The questions for whom judges no answers: what only judging needs, and has to be fetched, is not."""
        return self.questions(split, num_questions)

    @abstractmethod
    def verify(self, question: Question, response: str) -> Verdict:
        """The verdict on a finished response's text (without its end-of-turn token).

        A fault of the machinery raises; it is never a reward of 0. Responses that were cut at the
        token limit never get here: they are `truncated`.
        """

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        """The verdicts on many (question, response), in order: override it where they can be had side by side."""
        return [self.verify(question, response) for question, response in answers]

    def left_out(self) -> dict[str, Any]:
        """What a data set holds that the task does not ask, and why; empty for a task that makes its questions."""
        return {}

    def statement(self, question: Question) -> str:
        """What a question asks, without what the task adds to each of its questions: for comparing questions."""
        return question.text


class TraceSource(ABC):
    """Where the traces of a cross-entropy phase come from: a file, demonstrations of a data set, a generator."""

    @abstractmethod
    def traces(self, builder: PromptBuilder) -> Sequence[Trace]:
        """All traces, always the same ones in the same order.

        Raises:
            FileNotFoundError, ValueError: there are none; the message names the field and the remedy.
        """
