r"""Mathematics of one's own rows, answered in `\boxed{}` and compared with the gold answer as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sdzero.graders import math as math_grader
from sdzero.graders.worker_pool import Failed, GraderPool
from sdzero.tasks.boxed import after_thought, last_boxed
from sdzero.tasks.files import Row
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.rows import Rows
from sdzero.tasks.splits import Sizes
from sdzero.types import Question, Split, Verdict

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


class Math(Rows):
    r"""Questions of a file whose gold answers are LaTeX, as in OpenR1-Math or MATH.

    The last balanced `\boxed{}` after a response's thought is compared by value: by math-verify, in worker processes.
    Rows whose gold answer cannot be graded are left out, with a warning; they stand in `dropped`.

    Args:
        path: as in Rows.
        question_column: as in Rows.
        answer_column: as in Rows; of a whole solution the last `\boxed{}` is taken.
        id_column: as in Rows.
        instruction: appended to every question after a blank line; empty leaves the question as it is.
        num_workers: processes that grade.
        deadline: seconds of CPU time for one answer; one that takes longer is wrong (`timeout`).
        max_dropped_share: as in Rows.
        sizes: as in Rows.

    Raises:
        ModuleNotFoundError: math-verify or pebble is not installed; names the extra.
    """

    def __init__(
        self,
        path: str | HubDataset | dict[Split, str | HubDataset],
        question_column: str = "problem",
        answer_column: str = "answer",
        id_column: str | None = None,
        instruction: str = INSTRUCTION,
        num_workers: int = 2,
        deadline: float = 3.0,
        max_dropped_share: float = 0.05,
        sizes: Sizes | None = None,
    ) -> None:
        super().__init__(path, question_column, answer_column, id_column, max_dropped_share, sizes)
        math_grader.needs_math_verify()
        self.instruction = instruction
        self._pool = _shared_pool(num_workers, deadline)

    def verify(self, question: Question, response: str) -> Verdict:
        return self.verify_all([(question, response)])[0]

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        stated = [last_boxed(after_thought(response)) for _, response in answers]
        golds = [question.answer for question, _ in answers]
        verdicts = [math_grader.decide(answer, gold) for answer, gold in zip(stated, golds, strict=True)]
        open_ = [number for number, verdict in enumerate(verdicts) if verdict is None]
        outcomes = self._pool.map([(stated[number], golds[number]) for number in open_])
        for number, outcome in zip(open_, outcomes, strict=True):
            if isinstance(outcome, Failed):
                outcome = Verdict(0, outcome.reason, stated[number])
            verdicts[number] = outcome
        return [verdict for verdict in verdicts if verdict is not None]

    def ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        reasons = self._reasons({question.answer for question in questions})
        return {q.id: f"gold answer {q.answer!r}: {reasons[q.answer]}" for q in questions if q.answer in reasons}

    def prepare(self, row: Row) -> Sequence[Row]:
        gold = row.get(str(self.answer_column))
        if isinstance(gold, str) and (boxed := last_boxed(gold)) is not None:
            return [{**row, str(self.answer_column): boxed}]
        return [row]

    def asked(self, question: Question) -> str:
        return f"{question.text}\n\n{self.instruction}" if self.instruction else question.text

    def _reasons(self, golds: set[str]) -> dict[str, str]:
        """Why gold answers cannot be graded, for those that cannot."""
        reasons = {gold: math_grader.check_quickly(gold) for gold in sorted(golds)}
        slow = [gold for gold, reason in reasons.items() if reason is None]
        outcomes = self._pool.map([(None, gold) for gold in slow])
        for gold, outcome in zip(slow, outcomes, strict=True):
            reasons[gold] = f"grading it ends in {outcome.reason}" if isinstance(outcome, Failed) else outcome
        return {gold: reason for gold, reason in reasons.items() if reason}


@cache
def _shared_pool(num_workers: int, deadline: float) -> GraderPool[math_grader.Job, Any]:
    """One for all tasks of this process: the benchmarks of a suite would each start workers of their own."""
    return GraderPool(math_grader.work, math_grader.WARM_UP, num_workers, deadline)
