"""Which layers are sharded; what sharding does is in tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdzero.models import ModelConfig, load
from sdzero.sharding import _layers
from tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def test_layers_are_found_or_named(path: Path) -> None:
    model = load(ModelConfig(str(path)), seed=0)
    assert _layers(model, ModelConfig(str(path))) == list(model.hf.model.layers)
    mlps = _layers(model, ModelConfig(str(path), layer_classes=["Qwen3MLP"]))
    assert mlps == [layer.mlp for layer in model.hf.model.layers]
    with pytest.raises(ValueError, match=r"model\.layer_classes: no layer of \['LlamaDecoderLayer'\]"):
        _layers(model, ModelConfig(str(path), layer_classes=["LlamaDecoderLayer"]))
