"""Evaluation, the same for every method: answers come in scored, metrics go out under eval/."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import nn
from torchmetrics import Metric

from sdzero.metrics import AvgAtK, KeywordRate, PassAtK, ResponseLength
from sdzero.types import EvalBatch


class Evaluated(L.LightningModule):
    """The validation, test and predict steps of a method."""

    def __init__(self) -> None:
        super().__init__()
        self.eval_metrics = nn.ModuleDict()
        self.eval_rewards: dict[str, list[int]] = {}

    def _evaluate(self, batch: EvalBatch) -> None:
        if not self.eval_metrics:
            # not the length of a group: a rank that ran out of questions has none, and must know k all the same
            self.eval_metrics = _metrics(batch.num_samples).to(self.device)
        rewards = [[s.verdict.reward for s in group] for group in batch.groups]
        rollouts = [s.rollout for s in batch.scored]
        questions = [group[0].rollout.prompt.question.id for group in batch.groups]
        self.eval_rewards |= dict(zip(questions, rewards, strict=True))
        lengths, texts = [len(r.token_ids) for r in rollouts], [r.text for r in rollouts]
        updates: dict[str, tuple[Any, ...]] = {
            "accuracy": (rewards,),
            "pass": (rewards,),
            "length": (lengths, [r.finish_reason == "length" for r in rollouts]),
            "keywords": (texts, lengths),
        }
        for name, arguments in updates.items():
            metric = self.eval_metrics[name]
            assert isinstance(metric, Metric)
            metric.update(*arguments)

    def _log_evaluation(self) -> None:
        for metric in self.eval_metrics.values():
            assert isinstance(metric, Metric)
            self.log_dict({f"eval/{k}": v for k, v in metric.compute().items()}, rank_zero_only=True)
            metric.reset()

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation()

    def on_test_epoch_start(self) -> None:
        self.eval_rewards = {}

    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation()

    def predict_step(self, batch: EvalBatch, batch_idx: int) -> list[dict[str, Any]]:
        """The responses as plain rows: question, response, reward, reason."""
        return [
            {
                "question": s.rollout.prompt.question.id,
                "response": s.rollout.text,
                "reward": s.verdict.reward,
                "reason": s.verdict.reason,
            }
            for s in batch.scored
        ]


def _metrics(num_samples: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "accuracy": AvgAtK(),
            "pass": PassAtK(k=num_samples),
            "length": ResponseLength(),
            "keywords": KeywordRate(),
        }
    )
