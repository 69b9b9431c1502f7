r"""Mathematics from the user's own rows: answers in `\boxed{}`, compared with the gold answer as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sdzero.graders import math as math_grader
from sdzero.graders.errors import require_package
from sdzero.graders.worker_pool import Failed, GraderPool
from sdzero.tasks.boxed import last_boxed, strip_thinking
from sdzero.tasks.hub import Row
from sdzero.tasks.rows import Rows
from sdzero.tasks.sources import Source
from sdzero.types import Question, Split, Verdict

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


class Math(Rows):
    r"""Questions whose gold answers are LaTeX, as in OpenR1-Math or MATH.

    The last balanced `\boxed{}` after a response's thinking is compared by value: by math-verify, in worker processes.
    Rows whose gold answer cannot be graded are dropped, with a warning.

    Args:
        path: as in Rows.
        question_column: as in Rows.
        answer_column: column of the gold answer; of a whole solution, its last `\boxed{}` is taken.
        instruction: text appended to every question after a blank line; empty for none.
        num_workers: number of grading processes.
        deadline: CPU seconds per answer; a slower one is wrong (`timeout`).

    Raises:
        ModuleNotFoundError: math-verify is not installed; names the extra.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source],
        question_column: str = "problem",
        answer_column: str = "answer",
        instruction: str = INSTRUCTION,
        num_workers: int = 2,
        deadline: float = 3.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, question_column, answer_column, **kwargs)
        require_package("grading mathematics", "math_verify", "math")
        self.instruction = instruction
        self._pool = _shared_pool(num_workers, deadline)

    def verify(self, question: Question, response: str) -> Verdict:
        return self.verify_all([(question, response)])[0]

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        boxed = [last_boxed(strip_thinking(response)) for _, response in answers]
        golds = [question.answer for question, _ in answers]
        verdicts = [math_grader.decide(answer, gold) for answer, gold in zip(boxed, golds, strict=True)]
        undecided = [number for number, verdict in enumerate(verdicts) if verdict is None]
        outcomes = self._pool.map([(boxed[number], golds[number]) for number in undecided])
        for number, outcome in zip(undecided, outcomes, strict=True):
            failed = isinstance(outcome, Failed)
            verdicts[number] = Verdict(0, outcome.reason, boxed[number]) if failed else outcome
        return [verdict for verdict in verdicts if verdict is not None]

    def find_ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        golds = sorted({question.answer for question in questions})
        faults = {gold: math_grader.check_quickly(gold) for gold in golds}
        slow = [gold for gold, fault in faults.items() if fault is None]
        for gold, outcome in zip(slow, self._pool.map([(None, gold) for gold in slow]), strict=True):
            faults[gold] = f"grading it ends in {outcome.reason}" if isinstance(outcome, Failed) else outcome
        return {q.id: f"gold answer {q.answer!r}: {fault}" for q in questions if (fault := faults[q.answer])}

    def convert_row(self, row: Row) -> Sequence[Row]:
        gold = row.get(str(self.answer_column))
        if isinstance(gold, str) and (boxed := last_boxed(gold)) is not None:
            return [{**row, str(self.answer_column): boxed}]
        return [row]


@cache
def _shared_pool(num_workers: int, deadline: float) -> GraderPool[math_grader.Item, Any]:
    """Return the pool shared by all tasks of this process, such as the benchmarks of a suite."""
    return GraderPool(math_grader.work, math_grader.WARM_UP, num_workers, deadline)
