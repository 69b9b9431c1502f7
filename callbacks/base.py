"""What the callbacks that read responses share: they take them as they pass by, whatever the method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
from torchmetrics import Metric

from sdzero.evaluation.metrics import Scalars
from sdzero.methods import Method
from sdzero.types import EvalBatch, RolloutBatch


def drop_nan(figures: Scalars) -> Scalars:
    """Without the figures that have nothing to count from, such as a rate of wrong answers where all are right."""
    return {name: value for name, value in figures.items() if not value.isnan()}


def rank_file(trainer: L.Trainer, name: str, ending: str) -> Path:
    """`NAME-rankR.ENDING` in the stage's folder, for what is this rank's of a draw.

    Files of ranks that there were before a restart on fewer are removed: each of their responses is another's now.
    """
    path = Path(trainer.default_root_dir) / f"{name}-rank{trainer.global_rank}.{ending}"
    for file in path.parent.glob(f"{path.name.partition('-rank')[0]}-rank*.{ending}"):
        if trainer.is_global_zero and int(file.stem.rpartition("-rank")[2]) >= trainer.world_size:
            file.unlink()
    return path


class EvaluationReader(L.Callback, ABC):
    """Reads the responses of every validation and test. Where training samples nothing (SRT), there are no others."""

    @abstractmethod
    def read(self, trainer: L.Trainer, pl_module: Method, batch: EvalBatch) -> None:
        """Takes in one generate call of an evaluation."""

    @abstractmethod
    def finish(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Logs or writes what was read, and forgets it."""

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        assert isinstance(pl_module, Method)
        self.read(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        assert isinstance(pl_module, Method)
        self.read(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        self.finish(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        self.finish(trainer, pl_module)


class ResponseTracker(EvaluationReader):
    """Logs figures of each step's rollouts under rollout/, and of each evaluation's responses under eval/.

    It keeps nothing from one step to the next, so a resumed run goes on with the same curves.

    Args:
        metrics: the sums behind the figures, over all ranks' shares.
    """

    def __init__(self, **metrics: Metric) -> None:
        self.metrics = metrics

    @abstractmethod
    def update(self, pl_module: Method, batch: RolloutBatch | EvalBatch) -> None:
        """Adds a batch's responses to the metrics."""

    @abstractmethod
    def compute(self, evaluates: bool) -> Scalars:
        """The figures of all that was seen; `evaluates` tells an evaluation from a training step.

        In a training step what has nothing to count from stays nan: without it Lightning would log the value of the
        step before once more.
        """

    def read(self, trainer: L.Trainer, pl_module: Method, batch: RolloutBatch | EvalBatch) -> None:
        for metric in self.metrics.values():
            metric.to(pl_module.device).process_group = pl_module.share.across
        self.update(pl_module, batch)

    def finish(self, trainer: L.Trainer, pl_module: Method) -> None:
        self._log(pl_module, "eval")

    def _log(self, pl_module: Method, prefix: str) -> None:
        figures = self.compute(prefix == "eval")
        pl_module.log_dict({f"{prefix}/{name}": value for name, value in figures.items()}, rank_zero_only=True)
        for metric in self.metrics.values():
            metric.reset()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, RolloutBatch):
            assert isinstance(pl_module, Method)
            self.read(trainer, pl_module, batch)
            self._log(pl_module, "rollout")
