"""Demonstrations for supervised fine-tuning (SFT): another model's solutions as traces of a task's questions."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from sdzero.graders.sandbox.types import Language
from sdzero.tasks.base import Task, TraceSource
from sdzero.tasks.boxed import strip_thinking
from sdzero.tasks.codeforces import Codeforces
from sdzero.tasks.hub import HubDataset, Row
from sdzero.tasks.openr1 import OPENR1
from sdzero.tasks.sources import Source, read
from sdzero.types import Question, Split, Trace

if TYPE_CHECKING:  # prompts imports torch
    from sdzero.prompts import PromptBuilder

log = logging.getLogger(__name__)

OPENR1_GENERATIONS = replace(OPENR1, columns=(), streaming=False)
_COTS = "39ac85c150806230473c70ad72c31f6232fe3f41"  # as pinned in public code; not verified
CODEFORCES_COTS: dict[Language, Source] = {
    "cpp": HubDataset("open-r1/codeforces-cots", config="solutions", revision=_COTS, columns=()),
    "python": HubDataset("open-r1/codeforces-cots", config="solutions_py", revision=_COTS, columns=()),
}


class Demonstrations(TraceSource):
    """One solution per question of a task; questions without one are counted by reason in `set_aside`.

    Args:
        task: task whose questions are answered.
        split: `phase1` or `phase2`, never the held-out split.
        num_questions: number of questions, the first of the split; null for all.
        thoughts: keep the solution's `<think>` block.
        max_tokens: maximum trace length, including prompt and end-of-turn token.
    """

    def __init__(
        self,
        task: Task,
        split: Split = "phase1",
        num_questions: int | None = None,
        thoughts: bool = True,
        max_tokens: int = 32_768,  # table 4
    ) -> None:
        if split not in ("phase1", "phase2"):
            raise ValueError(f"data.source.split must be phase1 or phase2, got {split!r}: others are held out")
        self.split: Split = split
        self.task, self.num_questions = task, num_questions
        self.thoughts, self.max_tokens = thoughts, max_tokens
        self.set_aside: Counter[str] = Counter()

    @abstractmethod
    def solutions(self, questions: Sequence[Question]) -> Mapping[str, str]:
        """Return solutions, including their thinking, by question id; questions without one are missing."""

    def traces(self, builder: PromptBuilder) -> list[Trace]:
        self.set_aside.clear()
        questions = self.task.ungraded_questions(self.split, self.num_questions)
        solutions = self.solutions(questions)
        traces: list[Trace] = []
        for question in questions:
            solution = solutions.get(question.id, "")
            text = (solution if self.thoughts else strip_thinking(solution)).strip()
            if not text:
                self.set_aside["no correct and complete solution"] += 1
                continue
            trace = builder.demonstration(question, text)
            if len(trace.prompt_ids) + len(trace.revised_ids) > self.max_tokens:
                self.set_aside[f"more than {self.max_tokens} tokens"] += 1
                continue
            traces.append(trace)
        if not traces:
            raise ValueError(
                f"data.source.path: no solution for any of {len(questions)} questions of split {self.split!r} "
                f"({dict(self.set_aside)}): use the data set that belongs to data.source.task"
            )
        if self.set_aside:
            log.warning("left out %d of %d questions: %s", self.set_aside.total(), len(questions), self.set_aside)
        return traces


class OpenR1Demonstrations(Demonstrations):
    """DeepSeek-R1's generations for OpenR1-Math: the first of each question that is correct by math-verify and uncut.

    Args:
        task: OpenR1Math, or another task whose ids are those of the column `uuid`.
        path: file or data set with the columns uuid, generations, correctness_math_verify, is_reasoning_complete and
            finish_reasons.
    """

    def __init__(self, task: Task, path: Source = OPENR1_GENERATIONS, **kwargs: Any) -> None:
        super().__init__(task, **kwargs)
        self.path = path

    def solutions(self, questions: Sequence[Question]) -> dict[str, str]:
        """Return the first generations known to be correct and not known to be cut. Flags may be missing."""
        ids = {question.id.partition("/")[2]: question.id for question in questions}
        lists = ("generations", "correctness_math_verify", "is_reasoning_complete", "finish_reasons")
        found: dict[str, str] = {}
        for row in _read(self.path, ("uuid", *lists), lambda row: row.get("uuid") in ids):
            for text, correct, complete, reason in zip_longest(*(row.get(name) or () for name in lists)):
                if text and correct and complete is not False and reason != "length":
                    found.setdefault(ids[row["uuid"]], text)
        return found


def _read(source: Source, columns: Sequence[str], is_wanted: Callable[[Row], bool]) -> list[Row]:
    try:
        return read(source, columns, is_wanted)
    except ValueError as error:
        raise ValueError(f"data.source.path: {error}") from None


class CodeforcesDemonstrations(Demonstrations):
    """DeepSeek-R1's generations of codeforces-cots: the first of each question that is uncut and contains a program.

    They are not filtered for correctness.

    Args:
        task: task to answer; solutions are joined by problem id and language.
        path: for each language, file or data set with the columns id, generation and finish_reason.
    """

    def __init__(self, task: Codeforces, path: dict[Language, Source] = CODEFORCES_COTS, **kwargs: Any) -> None:
        super().__init__(task, **kwargs)
        if missing := [language for language in task.languages if language not in path]:
            raise ValueError(f"data.source.path has no solutions in {missing[0]}, one of data.source.task.languages")
        self.codeforces, self.path = task, path

    def solutions(self, questions: Sequence[Question]) -> dict[str, str]:
        found: dict[str, str] = {}
        for language in self.codeforces.languages:
            by_problem = {q.meta["problem"]: q for q in questions if q.meta["language"] == language}
            for row in _read(self.path[language], ("id", "generation", "finish_reason"), _is_uncut(by_problem)):
                question, text = by_problem[row["id"]], row.get("generation") or ""
                if question.id not in found and self.codeforces.program(question, text) is not None:
                    found[question.id] = text
        return found


def _is_uncut(problems: Mapping[str, Any]) -> Callable[[Row], bool]:
    return lambda row: row.get("id") in problems and row.get("finish_reason") != "length"
