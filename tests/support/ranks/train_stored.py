"""Trains on stored rollouts and traces, on one rank and on several, and saves gradients, metrics and weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow.parquet  # noqa: F401 - once, before the ranks are forked
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sdzero.callbacks import CopyTracker, KeywordTracker, LengthTracker, SampleWriter, TokenKLRecorder
from sdzero.data.base import stream_loader
from sdzero.losses import PolicyLoss
from sdzero.methods import SRT, Method, PolicyGradient, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.models.weights import full_weights
from sdzero.trainer.shares import share_of
from sdzero.trainer.strategies import FullShard
from sdzero.types import Prompt, Question, Rollout, RolloutBatch, ScoredRollout, Trace, TraceBatch, Verdict
from support.helpers import make_trainer
from support.ranks.forked import run_ranks

PENALTIES = PolicyLoss(kl_coef=0.1, entropy_coef=0.1)
METHODS: dict[str, Callable[..., Method]] = {
    "srt": SRT,
    "self_distill": SelfDistill,
    "policy_gradient": partial(PolicyGradient, policy_loss=PENALTIES),
}
NUM_STEPS, ITEMS = 3, (7, 6, 1)  # odd numbers: the ranks' shares differ, and once one rank has nothing
RUNS: dict[str, tuple[int, Callable[[], Any]]] = {  # name -> number of ranks, strategy
    "one": (1, lambda: "auto"),
    "offloaded": (1, FullShard),
    "fsdp2": (2, FullShard),
    "reduced": (2, FullShard),
    "ddp": (2, lambda: "ddp"),
    "tp": (2, lambda: FullShard(tensor_parallel_size=2)),
    "fsdp2_tp": (4, lambda: FullShard(tensor_parallel_size=2)),
}


def items(builder, kind: str, count: int, rng: random.Random) -> list:
    """Make traces, or scored responses; for a policy gradient groups of three responses."""
    if kind == "policy_gradient":
        groups = [items(builder, "self_distill", 3, rng) for _ in range(count)]
        prompts = [
            Prompt(Question(f"q{i}", "x", "1"), group[0].rollout.prompt.token_ids) for i, group in enumerate(groups)
        ]
        return [
            [ScoredRollout(replace(s.rollout, prompt=prompt), s.verdict) for s in group]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(4, 12) for _ in range(rng.randint(low, high)))

    made = []
    for i in range(count):
        question, reward = Question(f"q{i}", "x", "1"), rng.randrange(2)
        if kind == "srt":
            made.append(Trace(question, ids(2, 5), ids(1, 20), builder.bridge(reward), ids(1, 30), reward))
        else:
            response = (*ids(1, 40), builder.end_id)
            text = rng.choice(["6+3", f"Oops, wait. 6+3=9\n\n{builder.control_phrases[reward]}\n\n6+3=9, so 9"])
            rollout = Rollout(Prompt(question, ids(2, 5)), response, (0.0,) * len(response), text, "stop", 0)
            made.append(ScoredRollout(rollout, Verdict(1, "correct") if reward else Verdict(0, "wrong")))
    return made


class Stored(L.LightningDataModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self):
        assert self.trainer is not None
        share, builder = share_of(self.trainer), getattr(self.trainer.lightning_module, "builder")  # noqa: B009

        def batches():
            rng = random.Random(0)
            for step, count in enumerate(ITEMS):
                mine = items(builder, self.kind, count, rng)[share.index :: share.num_shares]
                if self.kind == "policy_gradient":
                    mine = [scored for group in mine for scored in group]
                yield TraceBatch(mine, step) if self.kind == "srt" else RolloutBatch(mine, step, step)

        return stream_loader(NUM_STEPS, batches)


class Record(L.Callback):
    """Gradients as the optimizer sees them, and the weights at the end."""

    def __init__(self, out: Path) -> None:
        self.out, self.gradients, self.losses = out, [], []
        self.gathers: list[list[int]] = [[]]  # of each step, the elements of each
        self.num_reduced = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        gather, reduce = dist.all_gather_single, dist.reduce_scatter_single

        def watched(output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.gathers[-1].append(output_tensor.numel())
            return gather(output_tensor, *args, **kwargs)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.num_reduced += 1
            return reduce(*args, **kwargs)

        dist.all_gather_single, dist.reduce_scatter_single = watched, counted

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for p in pl_module.student.parameters()]
        self.gradients.append([(g.full_tensor() if isinstance(g, DTensor) else g).clone() for g in grads])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.gathers.append([])
        self.losses.append({k: v.clone() for k, v in trainer.callback_metrics.items() if not k.endswith("second")})

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        weights = {name: tensor.clone() for name, tensor in full_weights(pl_module.student)}
        if trainer.is_global_zero:
            metrics = {"gradients": self.gradients, "losses": self.losses, "gathers": self.gathers}
            metrics["num_reduced"] = self.num_reduced
            if isinstance(ddp := trainer.strategy.model, DistributedDataParallel):
                sent = (*ddp.modules_buffers, *ddp._module_parameters)
                metrics["num_sent"] = len({id(tensor) for tensor in sent})
                metrics["num_of_student"] = len([*pl_module.student.buffers(), *pl_module.student.parameters()])
            torch.save({"weights": weights, **metrics}, self.out)


def train(kind: str, ranks: int, strategy: Callable[[], Any], model: ModelConfig, out: Path, rank: int) -> None:
    options = {
        "reduce_every_micro_batch": out.stem.endswith("-reduced"),
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.5),
        "max_tokens_per_micro_batch": 160,
        "max_grad_norm": 1.0,
    }
    method = METHODS[kind](model, **options)
    writers = [SampleWriter(every_n_steps=1), TokenKLRecorder(every_n_steps=1)]
    callbacks = [KeywordTracker(), LengthTracker(), CopyTracker(), *writers, Record(out)]
    trainer = make_trainer(out.with_suffix(""), *callbacks, devices=ranks, strategy=strategy())
    trainer.fit(method, datamodule=Stored(kind))


def main(model: str, out: Path) -> None:
    for kind in METHODS:
        for name, (ranks, strategy) in RUNS.items():
            if kind == "policy_gradient" and name not in ("one", "fsdp2", "tp"):
                continue
            config = ModelConfig(model, cpu_offload=name == "offloaded")
            work = partial(train, kind, ranks, strategy, config, out / f"{kind}-{name}.pt")
            run_ranks(ranks, out / f"{kind}-{name}-rank", work)
