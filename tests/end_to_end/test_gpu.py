"""Every GPU config trains on one GPU, with equal results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.runs import sdzero

RUNS = {"gpu": (), "ddp": (), "fsdp2": (), "fsdp": (), "offloaded": ("--model.student.cpu_offload=true",)}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in RUNS if name != "gpu"])
def test_two_steps_of_self_distillation(name: str, smoke_run: Path, tmp_path: Path) -> None:
    start = load_file(smoke_run / "srt/model/model.safetensors")
    alone, ours = (train(kind, smoke_run, tmp_path / kind) for kind in ("gpu", name))
    steps = [torch.cat([(model[w] - start[w]).flatten() for w in sorted(start)]) for model in (alone, ours)]
    # not bitwise: a strategy casts weights to bfloat16 in advance, autocast at their use (.998 on a CPU)
    assert torch.cosine_similarity(*steps, dim=0) > 0.97


def train(name: str, smoke_run: Path, out: Path) -> dict[str, torch.Tensor]:
    config = "fsdp2" if name == "offloaded" else name
    done = sdzero(
        *("fit", "--config", "configs/recipes/smoke/self_distill.yaml", "--config", f"configs/trainer/{config}.yaml"),
        *("--trainer.devices=1", "--trainer.max_steps=2", f"--trainer.default_root_dir={out}", *RUNS[name]),
        *(f"--model.student.path={smoke_run / 'srt/model'}", "--data.max_logprob_gap=0.3"),
        f"--data.disjoint_from={smoke_run / 'collect/questions.json'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(out / "model/model.safetensors")
