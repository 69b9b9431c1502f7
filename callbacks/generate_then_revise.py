"""Generate-then-Revise (section 3.2, table 9): does the model correct its first attempt when told the reward?"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from sdzero.data.base import StepDataModule
from sdzero.methods import Method
from sdzero.metrics import CorrectionRate
from sdzero.types import EvalBatch, ScoredRollout


class GenerateThenRevise(L.Callback):
    """Revises first attempts of every evaluation, and compares with plainly sampling another answer.

    Logs eval/revise_* (a revision from prompt + y + P_r) and eval/resample_* (an independent second answer,
    paired from the k samples at hand, so at no cost).

    Args:
        num_attempts: first attempts per question that are revised; at most the evaluation's num_samples.
    """

    def __init__(self, num_attempts: int = 1) -> None:
        self.num_attempts = num_attempts
        self.revise = CorrectionRate()
        self.resample = CorrectionRate()
        self.num_dropped = 0

    def _revise(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EvalBatch) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, StepDataModule) and isinstance(pl_module, Method)
        self.revise.to(pl_module.device)
        self.resample.to(pl_module.device)
        sampling, limit = data.evaluation.sampling, data.max_model_len()
        firsts, prompts = [], []
        for first in (scored for group in batch.groups for scored in group[: self.num_attempts]):
            prompt = pl_module.builder.revision_prompt(first)
            if len(prompt.token_ids) + sampling.max_new_tokens > limit:
                self.num_dropped += 1
                continue
            firsts.append(first)
            prompts.append(prompt)
        group = f"revise-{batch.policy_version:06d}-{batch.counter:05d}"
        revised, _ = data.sample(prompts, sampling, group, data.evaluation.call_size)
        self._update(self.revise, list(zip(firsts, revised, strict=True)))
        neighbours = [pair for g in batch.groups if len(g) > 1 for pair in zip(g, [*g[1:], g[0]], strict=True)]
        self._update(self.resample, neighbours)

    def _update(self, metric: CorrectionRate, pairs: list[tuple[ScoredRollout, ScoredRollout]]) -> None:
        first, second = [a.verdict.reward for a, _ in pairs], [b.verdict.reward for _, b in pairs]
        metric.update(first, second, [a.rollout.prompt.question.id for a, _ in pairs])

    def _log(self, pl_module: L.LightningModule) -> None:
        for name, metric in (("revise", self.revise), ("resample", self.resample)):
            values = {f"eval/{name}_{key}": value for key, value in metric.compute().items()}
            pl_module.log_dict(values, rank_zero_only=True)
            metric.reset()
        pl_module.log("eval/revise_dropped", torch.tensor(float(self.num_dropped)), reduce_fx="sum", sync_dist=True)
        self.num_dropped = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        *_: Any,
    ) -> None:
        self._revise(trainer, pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        *_: Any,
    ) -> None:
        self._revise(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module)
