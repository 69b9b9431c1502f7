"""Adapters on two gloo ranks are those of one; so is the model that teaches with them off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.runs import run_script
from support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name of a run -> its metrics."""
    out = tmp_path_factory.mktemp("runs")
    run_script("lora_ranks.py", base, out)
    return {path.parent.name: torch.load(path) for path in out.glob("*/metrics.pt")}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp(min=1e-30))


def learnt(weights: dict[str, torch.Tensor], base: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The adapters' part of the weights; everything else must be the folder's to the bit."""
    frozen = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    assert weights.keys() == frozen.keys()
    added = {name: tensor - frozen[name].float() for name, tensor in weights.items() if "_proj" in name}
    assert all(torch.equal(weights[name], frozen[name]) for name in weights if name not in added)
    assert all(tensor.any() for tensor in added.values())
    return added


@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_two_ranks_equal_one(runs: dict[str, Any], base: Path, name: str) -> None:
    """Float32, clipping, checkpointing, uneven shares, several micro batches. Only adapters have gradients."""
    one, two = runs["one"], runs[name]
    assert len(one["gradients"]) == len(two["gradients"]) == 3
    for ours, theirs in zip(one["gradients"], two["gradients"], strict=True):
        assert ours.keys() == theirs.keys() and len(ours) == 2 * 2 * 7 and all(".lora_" in key for key in ours)
        assert max(relative(grad, theirs[key]) for key, grad in ours.items()) < 1e-5
    expected, added = (learnt(metrics["weights"], base, torch.float32) for metrics in (one, two))
    assert max(relative(tensor, added[key]) for key, tensor in expected.items()) < 1e-4


@pytest.mark.parametrize("name", ["fsdp2_bf16", "ddp_bf16"])
def test_a_bfloat16_base_is_sharded_beside_float32_adapters(runs: dict[str, Any], base: Path, name: str) -> None:
    one, two = runs["one_bf16"], runs[name]
    assert {grad.dtype for step in two["gradients"] for grad in step.values()} == {torch.float32}
    expected, added = (learnt(metrics["weights"], base, torch.bfloat16) for metrics in (one, two))
    assert max(relative(tensor, added[key]) for key, tensor in expected.items()) < 0.1  # of bfloat16 computations


def test_a_sharded_checkpoint_goes_on_to_the_bit(runs: dict[str, Any]) -> None:
    whole, resumed = runs["fsdp2"], runs["resumed"]
    assert len(resumed["gradients"]) == 1
    assert all(torch.equal(tensor, resumed["weights"][name]) for name, tensor in whole["weights"].items())


def test_fsdp1_shards_frozen_weights_and_adapters_together(runs: dict[str, Any], base: Path) -> None:
    metrics = runs["fsdp1"]
    assert metrics["before"].keys() == metrics["sharded"]["weights"].keys()
    assert all(torch.equal(metrics["before"][n], t) for n, t in load_file(base / "model.safetensors").items())
    expected, added = (learnt(metrics[n]["weights"], base, torch.float32) for n in ("alone", "sharded"))
    assert max(relative(tensor, added[key]) for key, tensor in expected.items()) < 1e-4
    assert torch.equal(metrics["alone"]["off"], metrics["alone"]["base"])
    assert torch.equal(metrics["sharded"]["off"], metrics["sharded"]["base"])
