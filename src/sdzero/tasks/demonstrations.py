"""Demonstrations for supervised fine-tuning (SFT): another model's solutions as traces of a task's questions."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdzero.graders.sandbox.types import Language
from sdzero.tasks.base import Task, TraceSource
from sdzero.tasks.boxed import strip_thinking
from sdzero.tasks.codeforces import Codeforces
from sdzero.tasks.hub import HubDataset, Row
from sdzero.tasks.openr1 import OPENR1
from sdzero.tasks.sources import Source, read
from sdzero.types import Question, Split, Trace
from sdzero.utils.files import write_text

if TYPE_CHECKING:  # prompts imports torch
    from sdzero.prompts import PromptBuilder

log = logging.getLogger(__name__)

OPENR1_GENERATIONS = replace(OPENR1, columns=(), streaming=False)
_COTS = "39ac85c150806230473c70ad72c31f6232fe3f41"  # as pinned in public code; not verified
CODEFORCES_COTS: dict[Language, Source] = {
    "cpp": HubDataset("open-r1/codeforces-cots", config="solutions", revision=_COTS, columns=()),
    "python": HubDataset("open-r1/codeforces-cots", config="solutions_py", revision=_COTS, columns=()),
}
_BATCH = 512  # programs judged between two writes of the verdict cache


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

    def questions(self) -> list[Question]:
        return self.task.questions(self.split, self.num_questions)

    @abstractmethod
    def solutions(self, questions: Sequence[Question]) -> Mapping[str, str]:
        """Return solutions, including their thinking, by question id; questions without one are missing."""

    def traces(self, builder: PromptBuilder) -> list[Trace]:
        self.set_aside.clear()
        questions = self.questions()
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

    They are not filtered for correctness. `verified` runs them against the task's tests and takes the first that
    passes. Verdicts are cached in the folder of `datasets`, so that all ranks and all later runs choose the same ones.

    Args:
        task: task to answer; solutions are joined by problem id and language.
        path: for each language, file or data set with the columns id, generation and finish_reason.
        verified: accept only programs that pass all tests.
    """

    def __init__(
        self,
        task: Codeforces,
        path: dict[Language, Source] = CODEFORCES_COTS,
        verified: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(task, **kwargs)
        if missing := [language for language in task.languages if language not in path]:
            raise ValueError(f"data.source.path has no solutions in {missing[0]}, one of data.source.task.languages")
        self.codeforces, self.path, self.verified = task, path, verified

    def questions(self) -> list[Question]:
        if self.verified:
            return super().questions()
        return self.codeforces.ungraded_questions(self.split, self.num_questions)

    def solutions(self, questions: Sequence[Question]) -> dict[str, str]:
        candidates = self._candidates(questions)
        if not self.verified:
            return {id: texts[0] for id, texts in candidates.items() if texts}
        found: dict[str, str] = {}
        for number in range(max(map(len, candidates.values()), default=0)):
            answers = [
                (question, candidates[question.id][number])
                for question in questions
                if question.id not in found and number < len(candidates[question.id])
            ]
            rewards = self._rewards(answers)
            found |= {q.id: text for (q, text), reward in zip(answers, rewards, strict=True) if reward}
        return found

    def _candidates(self, questions: Sequence[Question]) -> dict[str, list[str]]:
        candidates: dict[str, list[str]] = {question.id: [] for question in questions}
        for language in self.codeforces.languages:
            by_problem = {q.meta["problem"]: q for q in questions if q.meta["language"] == language}

            def is_wanted(row: Row, by_problem: Mapping[str, Question] = by_problem) -> bool:
                return row.get("id") in by_problem and row.get("finish_reason") != "length"

            for row in _read(self.path[language], ("id", "generation", "finish_reason"), is_wanted):
                question = by_problem[row["id"]]
                if self.codeforces.program(question, row.get("generation") or "") is not None:
                    candidates[question.id].append(row["generation"])
        return candidates

    def _rewards(self, answers: Sequence[tuple[Question, str]]) -> list[int]:
        """Return rewards, in order. One process at a time judges, and the others read its cached verdicts."""
        from datasets import config

        judging = repr((self.codeforces.path, self.codeforces.limits))
        keys = [hashlib.sha256(f"{judging}\0{q.id}\0{text}".encode()).hexdigest()[:32] for q, text in answers]
        file = Path(config.HF_DATASETS_CACHE) / "sdzero" / "codeforces-verdicts.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
            new = [place for place, key in enumerate(keys) if key not in known]
            for start in range(0, len(new), _BATCH):
                places = new[start : start + _BATCH]
                verdicts = self.codeforces.verify_all([answers[place] for place in places])
                known |= {keys[place]: v.reward for place, v in zip(places, verdicts, strict=True)}
                write_text(file, json.dumps(known))
        return [known[key] for key in keys]
