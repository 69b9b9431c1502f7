"""Trains adapters on stored rollouts, on one rank and on two: DDP, FSDP2, FSDP1; float32 and bfloat16 base.

python lora_ranks.py MODEL_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import peft  # noqa: F401 - once, before the ranks are forked
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor

from sdzero.data.base import stream_loader
from sdzero.losses.soft_targets import hidden_targets
from sdzero.methods import SelfDistill
from sdzero.methods.batching import collate
from sdzero.models.language_model import ModelConfig, load
from sdzero.models.lora import AdaptersOff, Lora
from sdzero.models.parallelize import shard_fsdp1
from sdzero.models.weights import full_weights
from sdzero.trainer.strategies import FullShard
from sdzero.types import RolloutBatch
from support.helpers import make_trainer
from support.ranks.forked import run_ranks
from support.ranks.train_stored import ITEMS, items

RUNS: dict[str, tuple[int, Callable[[], Any], str]] = {  # name -> number of ranks, strategy, dtype of the base
    "one": (1, lambda: "auto", "float32"),
    "fsdp2": (2, FullShard, "float32"),
    "ddp": (2, lambda: "ddp", "float32"),
    "one_bf16": (1, lambda: "auto", "bfloat16"),
    "fsdp2_bf16": (2, FullShard, "bfloat16"),
    "ddp_bf16": (2, lambda: "ddp", "bfloat16"),
}


class Stored(L.LightningDataModule):
    """Rollouts made beforehand, from the step that the student has come to."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        method, rank, num_ranks = self.trainer.lightning_module, self.trainer.global_rank, self.trainer.world_size
        assert isinstance(method, SelfDistill)

        def batches() -> Iterator[RolloutBatch]:
            rng = random.Random(0)
            for step, count in enumerate(ITEMS):
                mine = items(method.builder, "self_distill", count, rng)[rank::num_ranks]
                if step >= method.policy_version:
                    yield RolloutBatch(mine, step, step)

        return stream_loader(len(ITEMS), batches)


class Gradients(L.Callback):
    """As the optimizer sees them, by name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        grads = {name: p.grad for name, p in pl_module.student.named_parameters() if p.grad is not None}
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
        self.steps.append({name: grad.clone() for name, grad in whole.items()})


def train(name: str, model: str, root: Path, start: Path | None, rank: int) -> None:
    ranks, strategy, dtype = RUNS[name]
    method = SelfDistill(
        ModelConfig(model, dtype=dtype, lora=Lora(4, 8.0), gradient_checkpointing=True),  # pyright: ignore
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        max_tokens_per_micro_batch=160,
    )
    gradients = Gradients()
    saver = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)
    precision = "bf16-mixed" if dtype == "bfloat16" else "32-true"
    options = {"devices": ranks, "strategy": strategy(), "precision": precision, "enable_checkpointing": True}
    trainer = make_trainer(root, gradients, saver, **options)
    trainer.fit(method, datamodule=Stored(), ckpt_path=start)
    weights = {name: tensor.clone() for name, tensor in full_weights(method.student)}
    if trainer.is_global_zero:
        torch.save({"gradients": gradients.steps, "weights": weights}, root / "metrics.pt")


def fsdp1(model: str, root: Path, rank: int) -> None:
    """As FSDPStrategy uses it: three steps of one rank's whole batch and of two ranks' halves; the base's own pass."""
    dist.init_process_group("gloo")
    config, device = ModelConfig(model, lora=Lora(4, 8.0)), torch.device("cpu")
    rows = [((5, 6, 7), tuple(range(4, 4 + n))) for n in (3, 9, 17, 30)]
    alone, sharded = load(config, 0), shard_fsdp1(load(config, 0), config, device, None)
    before = {name: tensor.clone() for name, tensor in full_weights(sharded)}
    metrics = []
    for student, mine in ((alone, rows), (sharded, rows[rank :: dist.get_world_size()])):
        optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
        batch = collate([c for c, _ in mine], [t for _, t in mine], 0)
        for _ in range(3):
            hidden = student(batch.input_ids, batch.predicts, lambda h, w: h)
            loss = (hidden @ torch.linspace(-1, 1, hidden.shape[1])).sum() / 1e3
            (loss * (1 if student is alone else dist.get_world_size())).backward()
            optimizer.step()
            optimizer.zero_grad()
        off = AdaptersOff(student)(batch.input_ids, batch.predicts, hidden_targets).hidden
        base = load(ModelConfig(model), 0)(batch.input_ids, batch.predicts, hidden_targets).hidden
        weights = {name: tensor.clone() for name, tensor in full_weights(student)}
        metrics.append({"weights": weights, "off": off, "base": base.detach()})
    if rank == 0:
        root.mkdir()
        torch.save({"before": before, "alone": metrics[0], "sharded": metrics[1]}, root / "metrics.pt")
    dist.destroy_process_group()


def main(model: str, out: Path) -> None:
    works: dict[str, tuple[int, Callable[[int], None]]] = {
        name: (run[0], partial(train, name, model, out / name, None)) for name, run in RUNS.items()
    }
    works["resumed"] = 2, partial(train, "fsdp2", model, out / "resumed", out / "fsdp2/step=2.ckpt")
    works["fsdp1"] = 2, partial(fsdp1, model, out / "fsdp1")
    for name, (ranks, work) in works.items():
        run_ranks(ranks, out / f"{name}-rank", work)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
