"""A model that is hashed and never loaded."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from sdzero.models.language_model import ModelConfig
from support.scripted_collection import TINY


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Tiny model's config and tokenizer, with a stand-in for its weights, which are hashed and never loaded."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("collect") / "model")
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    return ModelConfig(str(folder))
