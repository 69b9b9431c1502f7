"""FSDP1 on gloo ranks, as FSDPStrategy uses it: gradients, clipping, gathered weights, teacher synchronisation."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from sdzero.losses import Divergence, divergence_head
from sdzero.losses.soft_targets import hidden_targets
from sdzero.methods.batching import collate
from sdzero.models.language_model import ModelConfig, load
from sdzero.models.parallelize import shard_fsdp1
from sdzero.models.weights import full_weights, lerp_weights
from support.ranks.forked import run_ranks

ROWS = [((5, 6, 7), tuple(range(4, 4 + n))) for n in (3, 9, 17, 30)]


def work(num_ranks: int, folder: str, out: Path, rank: int) -> None:
    dist.init_process_group("gloo")
    config, device = ModelConfig(folder), torch.device("cpu")
    student = shard_fsdp1(load(config, 0), config, device, None)
    teacher = shard_fsdp1(load(config, 0).requires_grad_(False), config, device, None).eval()
    assert isinstance(student, FullyShardedDataParallel)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    losses, norms = [], []
    for step in range(3):
        with torch.no_grad():  # otherwise student and teacher agree and there is nothing to learn
            rows = [(c, tuple((t + step) % 20 + 4 for t in target)) for c, target in ROWS][rank::num_ranks]
        batch = collate([c for c, _ in rows], [t for _, t in rows], 0)
        shifted = collate([(*c, 9) for c, _ in rows], [t for _, t in rows], 0)
        with torch.no_grad():
            guide = teacher(shifted.input_ids, shifted.predicts, hidden_targets)
        count = sum(len(t) for _, t in ROWS)
        ones = torch.ones(len(batch.targets))
        output = student(
            batch.input_ids,
            batch.predicts,
            lambda h, w, g=guide, o=ones, n=count: divergence_head(h, w, g, o, n, Divergence()),
        )
        (output.loss * num_ranks).backward()
        total = output.loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
        norms.append(float(student.clip_grad_norm_(0.1)))
        optimizer.step()
        optimizer.zero_grad()
        lerp_weights(teacher, student, 1.0 if step == 1 else 0.25)
    models = [{n: t.clone() for n, t in full_weights(m)} for m in (student, teacher)]
    if rank == 0:
        torch.save({"losses": losses, "norms": norms, "student": models[0], "teacher": models[1]}, out)
    dist.destroy_process_group()


def main(model: str, out: Path) -> None:
    for num in (1, 2):
        run_ranks(num, out / f"fsdp1-{num}-rank", partial(work, num, model, out / f"fsdp1-{num}.pt"))
