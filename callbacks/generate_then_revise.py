"""Generate-then-Revise (section 3.2, table 9): correction of first attempts, given their reward."""

from __future__ import annotations

import lightning as L
from torchmetrics import SumMetric

from sdzero.callbacks.base import ResponseTracker
from sdzero.data.base import StepDataModule
from sdzero.evaluation.metrics import CorrectionRate, Ratios, Scalars
from sdzero.methods import Policy
from sdzero.types import EvalBatch, RolloutBatch


class GenerateThenRevise(ResponseTracker):
    """Compares revisions, as many as data.evaluation.num_revised, with sampling another response.

    Logs eval/revise_* (a revision from prompt + y + P_r, and the mean tokens of both attempts) and eval/resample_* (an
    independent second response, paired from the k samples of a question).
    """

    def __init__(self) -> None:
        self.rates = {"revise": CorrectionRate(), "resample": CorrectionRate()}
        self.tokens, self.dropped = Ratios("revise_tokens1", "revise_tokens2"), SumMetric()
        super().__init__(*self.rates.values(), self.tokens, self.dropped)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, StepDataModule) and data.evaluation.is_enabled and not data.evaluation.num_revised:
            raise ValueError("GenerateThenRevise has nothing to read: set data.evaluation.num_revised to 1 or more")

    def update(self, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        if isinstance(batch, RolloutBatch):
            return
        neighbours = [pair for g in batch.groups if len(g) > 1 for pair in zip(g, [*g[1:], g[0]], strict=True)]
        for name, pairs in (("revise", batch.revised), ("resample", neighbours)):
            first, second = [a.verdict.reward for a, _ in pairs], [b.verdict.reward for _, b in pairs]
            self.rates[name].update(first, second, [a.rollout.prompt.question.id for a, _ in pairs])
        lengths = [[len(s.rollout.token_ids) for s in pair] for pair in batch.revised]
        self.tokens.update(
            revise_tokens1=(sum(first for first, _ in lengths), len(lengths)),
            revise_tokens2=(sum(second for _, second in lengths), len(lengths)),
        )
        self.dropped.update(batch.num_unrevised)

    def compute(self, evaluates: bool) -> Scalars:
        if not evaluates:
            return {}
        rates = {f"{kind}_{name}": v for kind, metric in self.rates.items() for name, v in metric.compute().items()}
        return {**rates, **self.tokens.compute(), "revise_dropped": self.dropped.compute()}
