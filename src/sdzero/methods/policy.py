"""Evaluation, the same for every method: answers come in scored, metrics go out under eval/, as table 1 reports them:
per benchmark, and averaged over the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import nn
from torch.distributed import ProcessGroup
from torchmetrics import Metric

from sdzero.evaluation.metrics import AvgAtK, KeywordRate, PassAtK, ReasonShares, ResponseLength, Scalars, averaged
from sdzero.trainer.strategies import share_of
from sdzero.types import EvalBatch, ScoredRollout


class Evaluated(L.LightningModule):
    """The validation, test and predict steps of a method."""

    def __init__(self) -> None:
        super().__init__()
        self.eval_benchmarks: tuple[str, ...] = ()
        self.eval_metrics = nn.ModuleList()  # one for each of the benchmarks
        self.eval_rewards: dict[str, list[int]] = {}

    def _evaluate(self, batch: EvalBatch) -> None:
        if not self.eval_metrics:
            # not what this rank was asked: all ranks reduce the same figures, the one without a question too
            self.eval_benchmarks = batch.benchmarks
            self.eval_metrics = nn.ModuleList(BenchmarkFigures(batch.num_samples) for _ in batch.benchmarks)
            self.eval_metrics.to(self.device)
        for group in batch.groups:
            self.eval_rewards[group[0].rollout.prompt.question.id] = [s.verdict.reward for s in group]
        for name, figures in zip(self.eval_benchmarks, self.eval_metrics, strict=True):
            assert isinstance(figures, BenchmarkFigures)
            figures.update([group for group in batch.groups if group[0].rollout.prompt.question.benchmark == name])

    def _log_evaluation(self) -> None:
        across = share_of(self.trainer).across
        each = [figures.compute(across) for figures in self.eval_metrics if isinstance(figures, BenchmarkFigures)]
        several = len(each) > 1
        logged = dict(averaged(each) if several else each[0])
        for name, figures in zip(self.eval_benchmarks, each, strict=True):
            logged |= {f"{name}/{figure}": value for figure, value in figures.items() if several}
        self.log_dict({f"eval/{name}": value for name, value in logged.items()}, rank_zero_only=True)
        self.eval_metrics = nn.ModuleList()

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


class BenchmarkFigures(nn.Module):
    """The figures of one benchmark.

    Args:
        num_samples: k answers to each question.
    """

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.accuracy = AvgAtK()
        self.passed = PassAtK(num_samples)
        self.length = ResponseLength()
        self.keywords = KeywordRate()
        self.reasons = ReasonShares()

    def update(self, groups: Sequence[Sequence[ScoredRollout]]) -> None:
        """Adds the k answers to each of some questions."""
        scored = [s for group in groups for s in group]
        rewards = [[s.verdict.reward for s in group] for group in groups]
        lengths = [len(s.rollout.token_ids) for s in scored]
        self.accuracy.update(rewards)
        self.passed.update(rewards)
        self.length.update(lengths)
        self.keywords.update([s.rollout.text for s in scored], lengths)
        self.reasons.update([s.verdict.reason for s in scored])

    def compute(self, across: ProcessGroup | None = None) -> Scalars:
        """All figures, over the ranks of a process group; None: over all. Collective."""
        metrics = [module for module in self.children() if isinstance(module, Metric)]
        for metric in metrics:
            metric.process_group = across
        return {name: value for metric in metrics for name, value in metric.compute().items()}
