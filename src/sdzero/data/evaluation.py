"""Data module without training data, for `sdzero validate`, `test` and `predict`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdzero.data.base import StepDataModule
from sdzero.data.eval_stream import Evaluation
from sdzero.engines.base import RolloutEngine
from sdzero.tasks.base import Task
from sdzero.types import TraceBatch


class EvaluationDataModule(StepDataModule):
    """Responses to held-out questions.

    Args:
        task: questions and verifier.
        engine: rollout engine.
        evaluation: questions and sampling.
        kwargs: as in StepDataModule.
    """

    num_items = 0

    def __init__(self, task: Task, engine: RolloutEngine, evaluation: Evaluation, **kwargs: Any) -> None:
        super().__init__(1, task, engine, evaluation, **kwargs)

    def make_batch(self, counter: int, indices: Sequence[int]) -> TraceBatch:
        raise TypeError("EvaluationDataModule holds no training data: use RolloutDataModule or TraceDataModule")
