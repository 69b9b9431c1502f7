"""Abstract task (questions of one domain and their verifier) and abstract source of training traces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdzero.types import Question, Split, Trace, Verdict

if TYPE_CHECKING:  # prompts imports torch, which grading does without
    from sdzero.prompts import PromptBuilder


class Task(ABC):
    """Questions of one domain and their verifier. To add a task, add a file with a subclass: no registry."""

    @abstractmethod
    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        """Return the first `num_questions` of a split (None: all), always the same ones in the same order.

        Splits share no question identity and no text. An id starts with the task's name and a slash.

        Raises: ValueError if the split has fewer questions than requested, or is endless and all were requested.
        """

    def ungraded_questions(self, split: Split, num_questions: int | None) -> list[Question]:
        """Return `questions` for callers that do not grade: skips downloads only the verifier needs."""
        return self.questions(split, num_questions)

    @abstractmethod
    def verify(self, question: Question, response: str) -> Verdict:
        """Grade the text of a finished response (without its end-of-turn token).

        Responses cut at the token limit are `truncated` and never get here. A failure of the grader itself raises;
        it is never a reward of 0.
        """

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        """Grade many (question, response) pairs, in order; override it to grade in parallel."""
        return [self.verify(question, response) for question, response in answers]

    def exclusions(self) -> dict[str, Any]:
        """Return which rows of a data set the task does not use, and why; empty for generated questions."""
        return {}

    def statement(self, question: Question) -> str:
        """Return the question without the task's own instructions, for comparing questions between data sets."""
        return question.text


class TraceSource(ABC):
    """Source of traces for cross-entropy training: a file, demonstrations of a data set, a generator."""

    @abstractmethod
    def traces(self, builder: PromptBuilder) -> Sequence[Trace]:
        """Return all traces, always the same ones in the same order.

        Raises: FileNotFoundError or ValueError if there are none; the message names the key and the remedy.
        """
