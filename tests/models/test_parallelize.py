"""Choice of the sharded layers; sharded runs are tested in tests/methods and tests/models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoConfig, Qwen3Config

from sdzero.models.language_model import ModelConfig, load
from sdzero.models.parallelize import _layers, check_tensor_parallel
from sdzero.trainer.strategies import FullShard


def test_layers_are_found_or_named(path: Path) -> None:
    model = load(ModelConfig(str(path)), seed=0)
    assert _layers(model, ModelConfig(str(path))) == list(model.hf.model.layers)
    mlps = _layers(model, ModelConfig(str(path), layer_classes=["Qwen3MLP"]))
    assert mlps == [layer.mlp for layer in model.hf.model.layers]
    with pytest.raises(ValueError, match=r"student\.layer_classes: no layer of \['LlamaDecoderLayer'\]"):
        _layers(model, ModelConfig(str(path), layer_classes=["LlamaDecoderLayer"]))


def test_what_ranks_cannot_compute_together_is_refused() -> None:
    """The key and the model are named. Qwen3-4B and Olmo 3 7B have 32 heads each, and 8 and 32 of keys."""
    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 9728}
    check_tensor_parallel(Qwen3Config(**heads, tie_word_embeddings=True), 4)
    check_tensor_parallel(AutoConfig.for_model("olmo3", **{**heads, "num_key_value_heads": 32}), 8)
    check_tensor_parallel(AutoConfig.for_model("gpt2"), 1)
    for size, name in ((5, "num_attention_heads=32"), (16, "num_key_value_heads=8"), (3, "num_attention_heads=32")):
        with pytest.raises(ValueError, match=rf"strategy\.tensor_parallel_size={size}: qwen3 has {name}"):
            check_tensor_parallel(Qwen3Config(**heads), size)
    with pytest.raises(ValueError, match=r"intermediate_size=9729"):
        check_tensor_parallel(Qwen3Config(**{**heads, "intermediate_size": 9729}), 2)
    with pytest.raises(ValueError, match=r"strategy\.tensor_parallel_size=2: gpt2 has no plan"):
        check_tensor_parallel(AutoConfig.for_model("gpt2"), 2)
    with pytest.raises(ValueError, match=r"qwen3_moe needs .*moe.*, which is not supported"):
        check_tensor_parallel(AutoConfig.for_model("qwen3_moe"), 2)


def test_a_size_that_does_not_divide_the_processes_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda self: pytest.fail("it starts"))
    strategy = FullShard(tensor_parallel_size=3)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 does not divide the number of processes, which is 4"):
        strategy.setup_environment()
    with pytest.raises(ValueError, match=r"tensor_parallel_size must be at least 1"):
        FullShard(tensor_parallel_size=0)
