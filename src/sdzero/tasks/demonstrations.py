"""Solutions that another model wrote, as traces of a task's questions: what supervised finetuning (SFT) learns from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from sdzero.graders.sandbox.types import Language
from sdzero.tasks.base import Task, TraceSource
from sdzero.tasks.boxed import after_thought
from sdzero.tasks.codeforces import Codeforces
from sdzero.tasks.files import Row
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.rows import Source
from sdzero.tasks.sources import read
from sdzero.types import Question, Split, Trace
from sdzero.utils.files import write_text

if TYPE_CHECKING:  # prompts imports torch
    from sdzero.prompts import PromptBuilder

log = logging.getLogger(__name__)

OPENR1_GENERATIONS = HubDataset(
    "open-r1/OpenR1-Math-220k",
    config="default",
    revision="e4e141ec9dea9f8326f4d347be56105859b2bd68",  # as pinned in public code; not checked from here
    columns=(),
)
_COTS = "39ac85c150806230473c70ad72c31f6232fe3f41"  # as pinned in public code; not checked from here
CODEFORCES_COTS: dict[Language, Source] = {
    "cpp": HubDataset("open-r1/codeforces-cots", config="solutions", revision=_COTS, columns=()),
    "python": HubDataset("open-r1/codeforces-cots", config="solutions_py", revision=_COTS, columns=()),
}
_AT_ONCE = 512  # programs that are judged between two notes of their verdicts


class Demonstrations(TraceSource):
    """One written solution for each question of a task that has one.

    Questions without one are set aside, and counted by reason in `set_aside`.

    Args:
        task: whose questions are answered, in the task's own words.
        split: `phase1` or `phase2`; what is held out is not trained on.
        num_questions: the first of the split; null takes all.
        thoughts: keeps what stands in `<think>`; else a solution begins behind it.
        max_tokens: longest trace, prompt and end-of-turn token included.
    """

    def __init__(self, task: Task, split: Split, num_questions: int | None, thoughts: bool, max_tokens: int) -> None:
        if split not in ("phase1", "phase2"):
            raise ValueError(f"data.source.split must be phase1 or phase2, got {split!r}: the others are held out")
        self.split: Split = split
        self.task, self.num_questions = task, num_questions
        self.thoughts, self.max_tokens = thoughts, max_tokens
        self.set_aside: Counter[str] = Counter()

    def questions(self) -> list[Question]:
        return self.task.questions(self.split, self.num_questions)

    @abstractmethod
    def solutions(self, questions: Sequence[Question]) -> Mapping[str, str]:
        """The solution of each question that has one, by the question's id, with its thoughts."""

    def traces(self, builder: PromptBuilder) -> list[Trace]:
        self.set_aside.clear()
        questions = self.questions()
        solutions = self.solutions(questions)
        traces: list[Trace] = []
        for question in questions:
            solution = solutions.get(question.id, "")
            text = (solution if self.thoughts else after_thought(solution)).strip()
            if not text:
                self.set_aside["no solution that is right and whole"] += 1
                continue
            trace = builder.demonstration(question, text)
            if len(trace.prompt_ids) + len(trace.revised_ids) > self.max_tokens:
                self.set_aside[f"more than {self.max_tokens} tokens"] += 1
                continue
            traces.append(trace)
        if not traces:
            raise ValueError(
                f"data.source.path: none of {len(questions)} questions of split {self.split!r} has a solution there "
                f"({dict(self.set_aside)}): name the data set that belongs to data.source.task"
            )
        if self.set_aside:
            log.warning(
                "%d of %d questions are not trained on: %s", self.set_aside.total(), len(questions), self.set_aside
            )
        return traces


class OpenR1Demonstrations(Demonstrations):
    """DeepSeek-R1's generations for OpenR1-Math: of each question the first that is right by math-verify and not cut.

    Args:
        task: OpenR1Math, or another whose ids are those of the column `uuid`.
        split: as in Demonstrations.
        num_questions: as in Demonstrations.
        path: file or data set with the columns uuid, generations, correctness_math_verify, is_reasoning_complete and
            finish_reasons.
        thoughts: as in Demonstrations.
        max_tokens: as in Demonstrations.
    """

    def __init__(
        self,
        task: Task,
        split: Split = "phase1",
        num_questions: int | None = None,
        path: Source = OPENR1_GENERATIONS,
        thoughts: bool = True,
        max_tokens: int = 32_768,  # table 4
    ) -> None:
        super().__init__(task, split, num_questions, thoughts, max_tokens)
        self.path = path

    def solutions(self, questions: Sequence[Question]) -> dict[str, str]:
        ids = {question.id.partition("/")[2]: question.id for question in questions}
        lists = ("generations", "correctness_math_verify", "is_reasoning_complete", "finish_reasons")
        rows = _read(self.path, ("uuid", *lists), lambda row: row.get("uuid") in ids)
        found = {ids[row["uuid"]]: _first_right(*(row.get(name) or () for name in lists)) for row in rows}
        return {id: text for id, text in found.items() if text}


def _read(source: Source, columns: Sequence[str], is_wanted: Callable[[Row], bool]) -> list[Row]:
    try:
        return read(source, columns, is_wanted)
    except ValueError as error:
        raise ValueError(f"data.source.path: {error}") from None


def _first_right(
    generations: Sequence[str | None],
    right: Sequence[bool | None],
    complete: Sequence[bool | None],
    reasons: Sequence[str | None],
) -> str | None:
    """The first generation that is known to be right and not known to be cut. Any of the lists may be null."""
    for text, is_right, is_complete, reason in zip_longest(generations, right, complete, reasons):
        if text and is_right and is_complete is not False and reason != "length":
            return text
    return None


class CodeforcesDemonstrations(Demonstrations):
    """DeepSeek-R1's generations of codeforces-cots: of each question the first that was not cut and holds a program.

    They are not filtered for correctness. `verified` runs them against the tests of the task, and takes the first that
    passes. The verdicts are kept in the cache of `datasets`, so that all ranks and all later runs take the same ones.

    Args:
        task: the questions; solutions are joined on the problem's id and the language.
        split: as in Demonstrations.
        num_questions: as in Demonstrations.
        path: for each language the file or data set with the columns id, generation and finish_reason.
        verified: takes only programs that pass all tests.
        thoughts: as in Demonstrations.
        max_tokens: as in Demonstrations.
    """

    def __init__(
        self,
        task: Codeforces,
        split: Split = "phase1",
        num_questions: int | None = None,
        path: dict[Language, Source] = CODEFORCES_COTS,
        verified: bool = False,
        thoughts: bool = True,
        max_tokens: int = 32_768,  # table 4
    ) -> None:
        super().__init__(task, split, num_questions, thoughts, max_tokens)
        if lacking := [language for language in task.languages if language not in path]:
            raise ValueError(f"data.source.path names no solutions in {lacking[0]}, one of data.source.task.languages")
        self.codeforces, self.path, self.verified = task, path, verified

    def questions(self) -> list[Question]:
        if self.verified:
            return super().questions()
        return self.codeforces.to_read(self.split, self.num_questions)

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
            asked = {q.meta["problem"]: q for q in questions if q.meta["language"] == language}

            def is_wanted(row: Row, asked: Mapping[str, Question] = asked) -> bool:
                return row.get("id") in asked and row.get("finish_reason") != "length"

            for row in _read(self.path[language], ("id", "generation", "finish_reason"), is_wanted):
                question = asked[row["id"]]
                if self.codeforces.program(question, row.get("generation") or "") is not None:
                    candidates[question.id].append(row["generation"])
        return candidates

    def _rewards(self, answers: Sequence[tuple[Question, str]]) -> list[int]:
        """Of answers, in order. One process at a time judges, and the others read what it has found."""
        from datasets import config

        judging = repr((self.codeforces.path, self.codeforces.limits))
        keys = [hashlib.sha256(f"{judging}\0{q.id}\0{text}".encode()).hexdigest()[:32] for q, text in answers]
        file = Path(config.HF_DATASETS_CACHE) / "sdzero" / "codeforces-verdicts.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
            new = [place for place, key in enumerate(keys) if key not in known]
            for start in range(0, len(new), _AT_ONCE):
                places = new[start : start + _AT_ONCE]
                verdicts = self.codeforces.verify_all([answers[place] for place in places])
                known |= {keys[place]: v.reward for place, v in zip(places, verdicts, strict=True)}
                write_text(file, json.dumps(known))
        return [known[key] for key in keys]
