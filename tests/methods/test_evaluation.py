"""Evaluation on a rank that has run out of questions."""

from __future__ import annotations

from pathlib import Path

from helpers import make_scored
from sdzero.methods import Method
from sdzero.metrics import PassAtK
from sdzero.models import ModelConfig
from sdzero.types import EvalBatch, Question
from tiny_model import write_tiny_model


def test_a_first_batch_without_questions_knows_k(tmp_path: Path) -> None:
    """All ranks must reduce the same pass@k, whichever of them had no question left for its first call."""
    method = Method(ModelConfig(str(write_tiny_model(tmp_path))))
    method.validation_step(EvalBatch([], 0, 0, num_samples=3), 0)
    group = [make_scored(method.builder, Question("q", "1+1=", "2"), "2", reward) for reward in (0, 1, 0)]
    method.validation_step(EvalBatch([group], 0, 1, num_samples=3), 1)
    metric = method.eval_metrics["pass"]
    assert isinstance(metric, PassAtK)
    assert {name: float(value) for name, value in metric.compute().items()}["pass_at_3"] == 1
    assert method.eval_rewards == {"q": [0, 1, 0]}
