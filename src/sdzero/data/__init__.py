"""Data modules: one batch is one optimizer step."""

from sdzero.data.eval_stream import Evaluation
from sdzero.data.evaluation import EvaluationDataModule
from sdzero.data.rollouts import RolloutDataModule
from sdzero.data.traces import TraceDataModule, TraceFile

__all__ = ["Evaluation", "EvaluationDataModule", "RolloutDataModule", "TraceDataModule", "TraceFile"]
