"""Generate-then-Revise (section 3.2, table 9): correction of first attempts, given their reward."""

from __future__ import annotations

import lightning as L
from torchmetrics import SumMetric

from sdzero.callbacks.base import ResponseTracker
from sdzero.data.base import StepDataModule
from sdzero.evaluation.metrics import CorrectionRate, Ratio, Scalars
from sdzero.methods import Policy
from sdzero.types import EvalBatch, RolloutBatch, ScoredRollout


class GenerateThenRevise(ResponseTracker):
    """Compares revisions, as many as data.evaluation.num_revised, with sampling another response.

    Logs eval/revise_* (a revision from prompt + y + P_r, and the mean tokens of both attempts) and eval/resample_* (an
    independent second response, paired from the k samples of a question).
    """

    def __init__(self) -> None:
        super().__init__(
            revise=CorrectionRate(), resample=CorrectionRate(), tokens1=Ratio(), tokens2=Ratio(), dropped=SumMetric()
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, StepDataModule) and data.evaluation.is_enabled and not data.evaluation.num_revised:
            raise ValueError("GenerateThenRevise has nothing to read: set data.evaluation.num_revised to 1 or more")

    def update(self, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        if isinstance(batch, RolloutBatch):
            return
        neighbours = [pair for g in batch.groups if len(g) > 1 for pair in zip(g, [*g[1:], g[0]], strict=True)]
        self._update("revise", batch.revised)
        self._update("resample", neighbours)
        for i, name in enumerate(("tokens1", "tokens2")):
            self.metrics[name].update(sum(len(pair[i].rollout.token_ids) for pair in batch.revised), len(batch.revised))
        self.metrics["dropped"].update(batch.num_unrevised)

    def _update(self, name: str, pairs: list[tuple[ScoredRollout, ScoredRollout]]) -> None:
        first, second = [a.verdict.reward for a, _ in pairs], [b.verdict.reward for _, b in pairs]
        self.metrics[name].update(first, second, [a.rollout.prompt.question.id for a, _ in pairs])

    def compute(self, evaluates: bool) -> Scalars:
        if not evaluates:
            return {}
        values = {f"{kind}_{k}": v for kind in ("revise", "resample") for k, v in self.metrics[kind].compute().items()}
        for name in ("tokens1", "tokens2"):
            values[f"revise_{name}"] = self.metrics[name].compute()
        values["revise_dropped"] = self.metrics["dropped"].compute()
        return values
