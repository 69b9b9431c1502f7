"""Metrics of one benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed import ProcessGroup
from torchmetrics import Metric

from sdzero.evaluation.metrics import AvgAtK, KeywordRate, PassAtK, ReasonShares, ResponseLength, Scalars
from sdzero.types import ScoredRollout


class BenchmarkMetrics(nn.Module):
    """Accuracy, pass@k, lengths, keywords and verdicts of one benchmark's responses.

    Args:
        num_samples: k responses to each question.
    """

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.accuracy = AvgAtK()
        self.passed = PassAtK(num_samples)
        self.length = ResponseLength()
        self.keywords = KeywordRate()
        self.reasons = ReasonShares()

    def update(self, groups: Sequence[Sequence[ScoredRollout]]) -> None:
        """Adds questions, each with its k responses."""
        scored = [s for group in groups for s in group]
        rewards = [[s.verdict.reward for s in group] for group in groups]
        lengths = [len(s.rollout.token_ids) for s in scored]
        self.accuracy.update(rewards)
        self.passed.update(rewards)
        self.length.update(lengths)
        self.keywords.update([s.rollout.text for s in scored], lengths)
        self.reasons.update([s.verdict.reason for s in scored])

    def compute(self, across: ProcessGroup | None = None) -> Scalars:
        """All metrics over the ranks of a process group; None: over all ranks. Collective."""
        metrics = [module for module in self.children() if isinstance(module, Metric)]
        for metric in metrics:
            metric.process_group = across
        return {name: value for metric in metrics for name, value in metric.compute().items()}
