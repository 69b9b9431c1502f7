"""Fits that save and go on, on one rank and on two, from each other's checkpoints; and saves that fail on one of two.

python checkpoint_ranks.py MODEL_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from distributed.forked import forked
from distributed.train_stored import items
from sdzero.callbacks import TeacherSync
from sdzero.checkpoints import AtomicCheckpointIO
from sdzero.data.base import StepDataModule
from sdzero.methods import Schedule, SelfDistill
from sdzero.methods.base import BUDGET, FAULTS
from sdzero.models import ModelConfig
from sdzero.strategies import FSDP, FullShard
from sdzero.types import RolloutBatch
from sdzero.weights import full_weights

NUM_STEPS = 6  # two epochs of three
STRATEGIES: dict[str, Any] = {
    "sharded": FullShard,
    "one_file": lambda: FullShard(save_distributed_checkpoint=False),
    "fsdp1": lambda: FSDP(state_dict_type="sharded"),
    "plain": lambda: "auto",
}


class Stored(StepDataModule):
    """Rollouts made beforehand; which of them a step gets is the project's own order."""

    @property
    def num_items(self) -> int:
        return 7

    def make_batch(self, counter: int, indices: Sequence[int]) -> RolloutBatch:
        stored = items(self.policy.builder, "self_distill", self.num_items, random.Random(0))
        return RolloutBatch([stored[i] for i in indices], self.policy.policy_version, counter)


class Draws(L.Callback):
    """What every step draws of the global random states, and the questions it was asked."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        ids = [scored.rollout.prompt.question.id for scored in batch.scored]
        self.drawn.append([random.random(), float(np.random.rand()), float(torch.rand(())), ids])


def fit(model: str, root: Path, strategy: str, ranks: int, start: Path | None, max_steps: int) -> None:
    """`root/figures-rank*.pt` in the end. The random states differ from rank to rank and from run to run."""
    seed = hash((root.name, os.environ["RANK"])) % 2**31
    L.seed_everything(seed)
    method = SelfDistill(
        ModelConfig(model),
        # AdamW would blow up the last digits, in which one rank and two differ
        optimizer=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
        schedule=Schedule("cosine", warmup_steps=2),
        max_tokens_per_micro_batch=160,
    )
    data, draws = Stored(3), Draws()
    every_step = ModelCheckpoint(root / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[strategy](),
        max_steps=max_steps,
        plugins=[AtomicCheckpointIO()],
        callbacks=[TeacherSync(every_n_steps=2), draws, every_step],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(method, datamodule=data, ckpt_path=start)
    weights = {f"student.{name}": tensor.clone() for name, tensor in full_weights(method.student)}
    weights |= {f"teacher.{name}": tensor.clone() for name, tensor in full_weights(method.teacher)}
    state = {name: getattr(method, name) for name in ("policy_version", "teacher_generation", *BUDGET, *FAULTS)}
    state |= {"counter": data.counter, "step": trainer.global_step, "epoch": trainer.current_epoch}
    state |= {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
    figures = {"weights": weights, "state": state, "drawn": draws.drawn}
    torch.save(figures, root / f"figures-rank{trainer.global_rank}.pt")


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    only = sys.argv[3:]
    codes: dict[str, list[int]] = {}

    def run(name: str, strategy: str, ranks: int, start: str | None = None, max_steps: int = NUM_STEPS) -> None:
        if only and name not in only:
            return
        root, checkpoint = out / name, None if start is None else out / start
        root.mkdir(parents=True, exist_ok=True)
        codes[name] = forked(
            ranks, out / f"{name}.log", lambda _: fit(model, root, strategy, ranks, checkpoint, max_steps)
        )

    run("whole", "sharded", 2)
    run("same", "sharded", 2, "whole/checkpoints/step=3.ckpt")
    run("one", "sharded", 1, "whole/checkpoints/step=2.ckpt", 4)
    run("back", "sharded", 2, "one/checkpoints/step=4.ckpt")
    run("plain", "plain", 1, None, 3)
    run("from_plain", "one_file", 2, "plain/checkpoints/step=3.ckpt", 4)
    run("to_plain", "plain", 1, "from_plain/checkpoints/step=4.ckpt")
    run("fsdp1", "fsdp1", 2)
    (out / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
