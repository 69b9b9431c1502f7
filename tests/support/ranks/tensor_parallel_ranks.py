"""A model cut over two ranks beside the same model whole: what it computes, its gradients, and its weights. And a run
of the last of the models that is gone on with by ranks that cut it, and by ranks that do not.

python tensor_parallel_ranks.py OUT_FOLDER MODEL_FOLDER...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM  # noqa: F401 - once, before the ranks are forked

from sdzero.losses import cross_entropy_head
from sdzero.methods.batching import collate
from sdzero.models.language_model import LanguageModel, ModelConfig, load
from sdzero.models.parallelize import average_copies, shard_fsdp2
from sdzero.models.weights import full_weights, lerp_weights
from sdzero.trainer.shares import Share
from support.ranks.checkpoint_ranks import fit
from support.ranks.forked import forked

ROWS = [((5, 6, 7), tuple(range(4, 4 + n))) for n in (3, 9, 17, 30)]


def logprobs(model: LanguageModel) -> torch.Tensor:
    """Of each target; its gradients are left on the weights."""
    batch = collate([context for context, _ in ROWS], [target for _, target in ROWS], 0)
    weights = torch.linspace(0.5, 1.5, len(batch.targets))
    output = model(batch.input_ids, batch.predicts, lambda h, w: cross_entropy_head(h, w, batch.targets, weights, 59))
    output.loss.backward()
    return output.metrics["logprobs"]


def gradients_of_norms(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Of the norms before and after attention and MLP, which every rank holds whole."""
    named = [(name, p.grad) for name, p in model.named_parameters() if "layers." in name and "layernorm" in name]
    return {name: grad.to_local() for name, grad in named if isinstance(grad, DTensor)}


def compare(folder: str, rank: int) -> dict[str, float | bool]:
    config = ModelConfig(folder, gradient_checkpointing="qwen3" in folder)
    whole = load(config, 0)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    cut, other = (shard_fsdp2(load(config, 0), config, mesh, None) for _ in range(2))
    assert isinstance(cut, LanguageModel)
    differences = (logprobs(whole) - logprobs(cut)).abs()
    parts, gradients, norms = [], [], []
    for (name, ours), theirs in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert ours.grad is not None and isinstance(theirs, DTensor) and isinstance(theirs.grad, DTensor)
        gradient = theirs.grad.full_tensor()
        gradients.append(float((gradient - ours.grad).norm() / ours.grad.norm().clamp(min=1e-20)))
        norms += gradients[-1:] if "_norm" in name else []
        parts.append(theirs.to_local().numel() / ours.numel())
    shared = [torch.empty_like(differences) for _ in range(2)]
    dist.all_gather(shared, differences)
    averaged = gradients_of_norms(cut)
    for gradient in averaged.values():
        gradient += rank  # as if the ranks had rounded differently, by far
    expected = {name: gradient - rank + 0.5 for name, gradient in averaged.items()}
    average_copies([*cut.parameters()], dist.group.WORLD)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    lerp_weights(other, cut, 0.5)
    halves = dict(full_weights(other))
    return {
        "logprobs": float(differences.max()),
        "ranks_agree": torch.equal(*shared),
        "copies": all(torch.allclose(averaged[name], gradient, atol=1e-6) for name, gradient in expected.items()),
        "gradients": max(gradients),
        "head_norms": max(norms, default=0.0),
        "smallest_part": min(parts),
        "weights": all(torch.equal(2 * halves[name], weight) for name, weight in whole.hf.named_parameters()),
    }


def work(folders: list[str], out: Path, rank: int) -> None:
    dist.init_process_group("gloo")
    share = Share(0, 1, rank, 2, within=dist.group.WORLD)
    for count in range(6):
        assert share.gather([*share.scatter(range(count))]) == [*range(count)]
    torch.save({Path(folder).name: compare(folder, rank) for folder in folders}, out / f"rank{rank}.pt")
    dist.barrier()


def run(name: str, out: Path, work: Callable[[int], None]) -> None:
    codes = forked(2, out / f"{name}-rank", work)
    assert codes == [0, 0], f"{name}: {(out / f'{name}-rank0.log').read_text()[-3000:]}"


def main(out: Path, folders: list[str]) -> None:
    run("compared", out, partial(work, folders, out))
    third = out / "whole/checkpoints/step=3.ckpt"
    for name, strategy, start in (("whole", "tp", None), ("cut", "tp", third), ("uncut", "sharded", third)):
        (out / name).mkdir()
        run(name, out, lambda rank: fit(folders[-1], out / name, strategy, 2, start, 6))  # noqa: B023 - at once


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
