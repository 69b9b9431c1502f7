"""RemoteVLLMEngine with a real vLLM server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdzero.data import RolloutDataModule
from sdzero.engines import RemoteVLLMEngine
from sdzero.engines.base import EngineDied, EngineError, EngineSpec
from sdzero.methods import SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Sampling
from support.helpers import Toy, fit
from support.started_engines import SHM, make_prompts, scaled
from support.vllm_server import MAX_MODEL_LEN


@pytest.fixture(scope="module")
def trainer(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def engine(vllm_url: str, path: Path, builder: PromptBuilder, trainer: torch.nn.Module) -> Iterator[RemoteVLLMEngine]:
    """An engine that holds the trainer's weights as version 1."""
    engine = RemoteVLLMEngine([vllm_url], SHM)
    engine.start(EngineSpec(str(path), MAX_MODEL_LEN), builder)
    engine.sync(trainer.named_parameters(), 1)
    yield engine
    engine.close()


def test_a_server_that_received_nothing_is_detected(
    engine: RemoteVLLMEngine, trainer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._connected(), "send", list)  # consumes the weights and sends none
        with pytest.raises(EngineError, match=r"'model\.layers.* of the vLLM server at .* differs from what was sent"):
            engine.sync(scaled(trainer, 1.5).items(), 2)
    assert engine.policy_version is None
    engine.sync(trainer.named_parameters(), 3)


def test_weights_of_another_trainer_are_refused(
    engine: RemoteVLLMEngine, path: Path, builder: PromptBuilder, trainer: torch.nn.Module
) -> None:
    """Each response names the weights it was sampled from, so the next one shows it."""
    other = RemoteVLLMEngine(engine.urls, SHM)
    other.start(EngineSpec(str(path), MAX_MODEL_LEN), builder)
    other.sync(scaled(trainer, 0.9).items(), 1)
    with pytest.raises(EngineDied, match=r"was sampled from weights \['1-.*'\], not 1-.*: another trainer uses"):
        engine.generate(make_prompts(builder, 2), Sampling(1.0, 1.0, 4), seed=0, policy_version=1)
    other.close()


def test_the_folder_is_empty_after_a_sync(engine: RemoteVLLMEngine, trainer: torch.nn.Module, tmp_path: Path) -> None:
    engine.folder, engine._transport = tmp_path / "weights", None
    assert engine.sync(trainer.named_parameters(), 1).checksum == engine.sync(trainer.named_parameters(), 2).checksum
    assert not list((tmp_path / "weights").iterdir())
    engine.folder, engine._transport = Path("/proc"), None  # where nothing can be written
    with pytest.raises(EngineError, match=r"did not reach the vLLM server"):
        engine.sync(trainer.named_parameters(), 3)


def test_a_fit_samples_from_a_server_while_it_trains(vllm_url: str, path: Path, tmp_path: Path) -> None:
    """Weights that move far at each step: rollouts from others than the compared ones would be nats off."""
    engine = RemoteVLLMEngine([vllm_url], SHM)
    options = {"sampling": Sampling(max_new_tokens=20), "max_logprob_gap": 1e-3, "overlap": True}
    data = RolloutDataModule(Toy(), engine, 8, 2, **options)
    steps = fit(SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)), data, tmp_path)
    assert steps.curve("rollout/policy_lag") == [0, 1, 1, 1]
    assert max(steps.curve("rollout/logprob_gap")) < 1e-4
    assert min(steps.curve("train/grad_norm")) > 0
