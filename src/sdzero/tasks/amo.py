"""AMO-Bench: 50 problems of olympiads, of which a program can grade 39 (An et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence

from sdzero.tasks.files import Row
from sdzero.tasks.math import Math
from sdzero.tasks.rows import SetAside, Source
from sdzero.types import Split

_PARSED = ("number", "set", "variable")


class AMOBench(Math):
    """AMO-Bench's problems whose answer is a number, a set or a formula in variables.

    The others' answers are descriptions, which need a judge model: `set_aside` counts them. A prompt says already how
    the answer is to be given, so no instruction is added.

    Args:
        path: as in Rows.
        num_workers: as in Math.
        deadline: as in Math.
        max_dropped_share: as in Rows.

    Raises:
        ModuleNotFoundError: math-verify or pebble is not installed; names the extra.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source],
        num_workers: int = 2,
        deadline: float = 3.0,
        max_dropped_share: float = 0.05,
    ) -> None:
        super().__init__(
            path, "prompt", "answer", "question_id", "", num_workers, deadline, max_dropped_share=max_dropped_share
        )

    def columns(self) -> dict[str, str]:
        return {**super().columns(), "task.path": "answer_type"}

    def prepare(self, row: Row) -> Sequence[Row]:
        if row.get("answer_type") == "description":
            raise SetAside("its answer is a description, which needs a judge model")
        if row.get("answer_type") not in _PARSED:
            raise ValueError(f"column 'answer_type' is {row['answer_type']!r}, none of {_PARSED} and 'description'")
        return super().prepare(row)
