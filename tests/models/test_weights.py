"""Whole weights: handed out, and averaged into another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdzero.models.language_model import ModelConfig, load
from sdzero.models.weights import full_weights, lerp_weights
from support.helpers import same, weights_of
from support.tiny_model import write_tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_full_weights_are_those_that_save_pretrained_writes(tmp_path: Path, tied: bool) -> None:
    path = write_tiny_model(tmp_path, tie_word_embeddings=tied)
    weights = dict(full_weights(load(ModelConfig(str(path)), seed=0)))
    assert same(weights, load_file(path / "model.safetensors"))
    assert ("lm_head.weight" in weights) == (not tied)
    assert not any(tensor.requires_grad for tensor in weights.values())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lerp_moves_the_target_towards_the_source(weight: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    target, source = nn.Linear(7, 5).to(dtype), nn.Linear(7, 5)
    before, of = weights_of(target), weights_of(source)
    lerp_weights(target, source, weight)
    for name, value in weights_of(target).items():
        expected = (before[name] + weight * (of[name].to(dtype) - before[name])) if weight < 1 else of[name].to(dtype)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-3)
        assert weight < 1 or torch.equal(value, expected)
    assert same(weights_of(source), of)
