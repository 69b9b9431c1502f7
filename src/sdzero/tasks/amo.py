"""AMO-Bench: 50 olympiad problems, 39 of them gradable by a program (An et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdzero.tasks.hub import Row
from sdzero.tasks.math import Math
from sdzero.tasks.rows import SetAside
from sdzero.tasks.sources import Source
from sdzero.types import Split

_GRADABLE = ("number", "set", "variable")


class AMOBench(Math):
    """AMO-Bench's problems whose answer is a number, a set or a formula in variables.

    Problems whose answer is a description need a judge model, and are counted in `set_aside`. The prompts already state
    the answer format, so no instruction is added.

    Args:
        path: as in Rows.
    """

    def __init__(self, path: Source | dict[Split, Source], **kwargs: Any) -> None:
        super().__init__(path, "prompt", "answer", id_column="question_id", instruction="", sizes=None, **kwargs)

    def required_columns(self) -> dict[str, str]:
        return {**super().required_columns(), "task.path": "answer_type"}

    def convert_row(self, row: Row) -> Sequence[Row]:
        kind = row.get("answer_type")
        if kind == "description":
            raise SetAside("its answer is a description, which needs a judge model")
        if kind not in _GRADABLE:
            raise ValueError(f"column 'answer_type' is {kind!r}, expected 'description' or one of {_GRADABLE}")
        return super().convert_row(row)
