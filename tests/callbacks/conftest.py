"""A tiny model of one layer, and its prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdzero.prompts import PromptBuilder
from support.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1, hidden_size=32)


@pytest.fixture(scope="session")
def builder(path: Path) -> PromptBuilder:
    return PromptBuilder.from_pretrained(path)
