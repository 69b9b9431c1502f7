"""Engines for the contract of rollout engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdzero.engines.base import RolloutEngine
from sdzero.prompts import PromptBuilder
from support.started_engines import NAMES, SAMPLERS, StartedEngines


@pytest.fixture(scope="module")
def trainer(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def started(path: Path, builder: PromptBuilder) -> Iterator[StartedEngines]:
    started = StartedEngines(str(path), builder)
    yield started
    for name in list(started.engines):
        started.close(name)


def synced(request: pytest.FixtureRequest, started: StartedEngines, trainer: torch.nn.Module) -> RolloutEngine:
    """An engine that holds the trainer's weights as version 1."""
    url = request.getfixturevalue("vllm_url") if request.param == "remote" else ""
    engine = started.get(request.param, url)
    engine.sync(trainer.named_parameters(), 1)
    return engine


engine = pytest.fixture(params=NAMES, name="engine")(synced)
sampler = pytest.fixture(params=SAMPLERS, name="sampler")(synced)
