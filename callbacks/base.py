"""Base classes of the callbacks that read responses, of training steps and of evaluations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
from torchmetrics import Metric

from sdzero.evaluation.metrics import Scalars
from sdzero.methods import Policy
from sdzero.types import EvalBatch, RolloutBatch


def drop_nan(metrics: Scalars) -> Scalars:
    """Drop metrics without data, such as a rate over wrong responses when all are right."""
    return {name: value for name, value in metrics.items() if not value.isnan()}


def rank_file(trainer: L.Trainer, name: str, ending: str) -> Path:
    """Return `NAME-rankR.ENDING` in the stage's folder, for this rank's responses.

    Removes the files of higher ranks, which a run with more ranks left before a restart.
    """
    path = Path(trainer.default_root_dir) / f"{name}-rank{trainer.global_rank}.{ending}"
    for file in path.parent.glob(f"{path.name.partition('-rank')[0]}-rank*.{ending}"):
        if trainer.is_global_zero and int(file.stem.rpartition("-rank")[2]) >= trainer.world_size:
            file.unlink()
    return path


class EvaluationReader(L.Callback, ABC):
    """Reads the responses of every validation and test."""

    @abstractmethod
    def read(self, trainer: L.Trainer, pl_module: Policy, batch: EvalBatch) -> None:
        """Read one generate call of an evaluation."""

    @abstractmethod
    def finish(self, trainer: L.Trainer, pl_module: Policy) -> None:
        """Log or write the evaluation's result, and reset."""

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Policy)
        self.read(trainer, pl_module, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Policy)
        self.finish(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end


class ResponseTracker(EvaluationReader):
    """Logs metrics of each step's rollouts under rollout/, and of each evaluation's responses under eval/.

    Nothing is kept from one step to the next, so a resumed run continues the same curves.

    Args:
        metrics: sums over the responses of all ranks.
    """

    def __init__(self, *metrics: Metric) -> None:
        self.metrics = metrics

    @abstractmethod
    def update(self, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        """Add a batch's responses to the metrics."""

    def compute(self, evaluates: bool) -> Scalars:
        """Return the values to log; `evaluates` is True after an evaluation, False after a training step.

        After a training step, values without data must stay NaN: if they were missing, Lightning would log those of
        the previous step again.
        """
        values = {name: value for metric in self.metrics for name, value in metric.compute().items()}
        return drop_nan(values) if evaluates else values

    def read(self, trainer: L.Trainer, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        for metric in self.metrics:
            metric.to(pl_module.device).process_group = pl_module.share.across
        self.update(pl_module, batch)

    def finish(self, trainer: L.Trainer, pl_module: Policy) -> None:
        self._log(pl_module, "eval")

    def _log(self, pl_module: Policy, prefix: str) -> None:
        values = self.compute(prefix == "eval")
        pl_module.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, rank_zero_only=True)
        for metric in self.metrics:
            metric.reset()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, RolloutBatch):
            assert isinstance(pl_module, Policy)
            self.read(trainer, pl_module, batch)
            self._log(pl_module, "rollout")
