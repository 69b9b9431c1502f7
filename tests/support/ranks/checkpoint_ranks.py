"""Fits on one rank and on two that resume from each other's checkpoints, and saves that fail on one of two ranks.

python checkpoint_ranks.py MODEL_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sdzero.callbacks import TeacherSync
from sdzero.data.base import StepDataModule
from sdzero.methods import Schedule, SelfDistill
from sdzero.methods.base import FAULTS
from sdzero.models.language_model import ModelConfig
from sdzero.models.lora import Lora
from sdzero.models.weights import full_weights
from sdzero.trainer import sharded_checkpoint
from sdzero.trainer.checkpoint_io import AtomicCheckpointIO
from sdzero.trainer.strategies import FSDP, FullShard
from sdzero.types import BUDGET, RolloutBatch
from sdzero.utils.seeds import derive_seed
from support.killed_saves import flip_a_bit
from support.ranks.forked import forked
from support.ranks.train_stored import items

NUM_STEPS = 6  # two epochs of three
STRATEGIES: dict[str, Any] = {
    "sharded": FullShard,
    "tp": lambda: FullShard(tensor_parallel_size=2),
    "one_file": lambda: FullShard(save_distributed_checkpoint=False),
    "fsdp1": FSDP,
    "plain": lambda: "auto",
}


class Stored(StepDataModule):
    """Stored rollouts in the project's order."""

    @property
    def num_items(self) -> int:
        return 7

    def make_batch(self, counter: int, indices: Sequence[int]) -> RolloutBatch:
        stored = items(self.policy.builder, "self_distill", self.num_items, random.Random(0))
        return RolloutBatch([stored[i] for i in indices], self.policy.policy_version, counter)


class RandomNumbers(L.Callback):
    """Records random numbers of the global random states and the question ids of every step."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        ids = [scored.rollout.prompt.question.id for scored in batch.scored]
        self.drawn.append([random.random(), float(np.random.rand()), float(torch.rand(())), ids])


def fit(model: str, root: Path, strategy: str, ranks: int, start: Path | None, max_steps: int) -> None:
    """Train and write `root/metrics-rank*.pt`. The random states differ from rank to rank and from run to run.

    A run whose name begins with "adapters" trains these, beside frozen weights that are its teacher.
    """
    lora = Lora() if root.name.startswith("adapters") else None
    seed = derive_seed(root.name, os.environ["RANK"])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    method = SelfDistill(
        ModelConfig(model, lora=lora),
        # AdamW would blow up the last digits, in which one rank and two differ
        optimizer=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
        schedule=Schedule("constant", warmup_steps=2),
        max_tokens_per_micro_batch=160,
    )
    data, draws = Stored(3), RandomNumbers()
    every_step = ModelCheckpoint(root / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[strategy](),
        max_steps=max_steps,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*([] if lora else [TeacherSync(every_n_steps=2)]), draws, every_step],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(method, datamodule=data, ckpt_path=start)
    weights = {f"student.{name}": tensor.clone() for name, tensor in full_weights(method.student)}
    if lora is None:
        weights |= {f"teacher.{name}": tensor.clone() for name, tensor in full_weights(method.teacher)}
    state = {name: getattr(method, name) for name in ("policy_version", "teacher_generation", *BUDGET, *FAULTS)}
    state |= {"counter": data.counter, "step": trainer.global_step, "epoch": trainer.current_epoch}
    state |= {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
    metrics = {"weights": weights, "state": state, "drawn": draws.drawn}
    torch.save(metrics, root / f"metrics-rank{trainer.global_rank}.pt")


def fail(error: BaseException | None) -> None:
    """Fail, or kill this process, at the third file that it hashes."""
    hashes = iter(range(3))
    real = sharded_checkpoint.file_sha256

    def failing(path: Path) -> str:
        if next(hashes) < 2:
            return real(path)
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise error or AssertionError

    sharded_checkpoint.file_sha256 = failing


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    codes: dict[str, list[int]] = {}

    def run(
        name: str,
        strategy: str,
        ranks: int,
        start: str | None = None,
        max_steps: int = NUM_STEPS,
        before: Callable[[int], None] = lambda rank: None,
    ) -> None:
        root, checkpoint = out / name, None if start is None else out / start
        root.mkdir(parents=True)

        def work(rank: int) -> None:
            before(rank)
            fit(model, root, strategy, ranks, checkpoint, max_steps)

        codes[name] = forked(ranks, root / "rank", work)

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    run("whole", "sharded", 2)
    run("same", "sharded", 2, "whole/checkpoints/step=3.ckpt")
    run("one", "sharded", 1, "whole/checkpoints/step=2.ckpt", 4)
    run("back", "sharded", 2, "one/checkpoints/step=4.ckpt")
    run("plain", "plain", 1, None, 3)
    run("file", "one_file", 2, "plain/checkpoints/step=3.ckpt", 5)
    run("from_file", "plain", 1, "file/checkpoints/step=5.ckpt")
    run("adapters", "plain", 1, None, 3)
    run("adapters_file", "one_file", 2, "adapters/checkpoints/step=1.ckpt", 2)
    run("adapters_again", "plain", 1, "adapters_file/checkpoints/step=2.ckpt", 3)
    run("fsdp1", "fsdp1", 2, None, 3)
    run("fsdp1_same", "fsdp1", 2, "fsdp1/checkpoints/step=2.ckpt", 3)
    run("failed", "sharded", 2, before=lambda rank: fail(full) if rank == 1 else None)
    run("killed", "sharded", 2, before=lambda rank: fail(None) if rank == 1 else None)
    flip_a_bit(out / "killed/checkpoints/step=1.ckpt/__1_0.distcp")
    run("damaged", "sharded", 2, "killed/checkpoints/step=1.ckpt")
    (out / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
