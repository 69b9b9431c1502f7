"""Data module without training data, for `sdzero validate`, `test` and `predict`."""

from __future__ import annotations

from collections.abc import Sequence

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
        max_logprob_gap: as in StepDataModule.
        engine_dtype: dtype of the engine's weights, `float32` or `bfloat16`.
        max_engine_restarts: as in StepDataModule.
    """

    def __init__(
        self,
        task: Task,
        engine: RolloutEngine,
        evaluation: Evaluation,
        max_logprob_gap: float = 0.3,
        engine_dtype: str = "float32",
        max_engine_restarts: int = 2,
    ) -> None:
        super().__init__(1, task, engine, evaluation, max_logprob_gap, engine_dtype, max_engine_restarts)

    @property
    def num_items(self) -> int:
        return 0

    def make_batch(self, counter: int, indices: Sequence[int]) -> TraceBatch:
        raise TypeError("EvaluationDataModule holds no training data: use RolloutDataModule or TraceDataModule")
