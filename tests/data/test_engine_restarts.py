"""Restarts of a failed engine: their number is bounded, and the samples stay the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdzero.data import RolloutDataModule
from sdzero.data.collect import Collect
from sdzero.engines import ScriptedEngine, TransformersEngine
from sdzero.engines.base import EngineDied, EngineError, SyncReport
from sdzero.engines.sync_check import SyncCheck, WeightLayout
from sdzero.methods import SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.types import Prompt, Rollout, Sampling
from support.helpers import Toy, fit, same, weights_of
from support.tiny_model import write_tiny_model

SAMPLING = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1, hidden_size=32)


class Mortal(TransformersEngine):
    """Fails in the calls of the given numbers, counted from 0 over all its starts. `sizes`: prompts of each call."""

    def __init__(self, dies_in: Sequence[int], error: type[EngineError] = EngineDied) -> None:
        super().__init__()
        self.dies_in, self.error = dies_in, error
        self.sizes: list[int] = []
        self.num_starts = 0

    def start(self, *arguments: Any) -> None:
        self.num_starts += 1
        super().start(*arguments)

    def generate(self, prompts: Sequence[Prompt], *rest: Any, **more: Any) -> list[Rollout]:
        self.sizes.append(len(prompts))
        if len(self.sizes) - 1 in self.dies_in:
            self.close()
            raise self.error("the engine fell over")
        return super().generate(prompts, *rest, **more)


def train(path: Path, root: Path, engine: Mortal, lr: float = 1e-3, **options: Any) -> tuple[SelfDistill, list[float]]:
    """Three steps of two calls each."""
    data = RolloutDataModule(Toy(), engine, 12, 4, sampling=SAMPLING, call_size=2, max_logprob_gap=1e-3, **options)
    method = SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0))
    return method, fit(method, data, root).curve("rollout/engine_restarts")


def test_training_continues_with_the_same_samples(path: Path, tmp_path: Path) -> None:
    whole, none = train(path, tmp_path / "whole", Mortal([]))
    engine = Mortal([3, 4])  # the second call of the second step, and its repetition
    method, restarts = train(path, tmp_path / "died", engine)
    assert none == [0, 0, 0] and restarts == [0, 2, 2]
    assert engine.num_starts == 3 and len(engine.sizes) == 6 + 2, "the finished call is not made again"
    assert same(weights_of(whole), weights_of(method))


def test_the_number_of_restarts_is_bounded(path: Path, tmp_path: Path) -> None:
    engine = Mortal(range(100))
    with pytest.raises(EngineError, match=r"fell over. The engine was restarted max_engine_restarts=2 times") as caught:
        train(path, tmp_path, engine)
    assert engine.num_starts == 3 and not isinstance(caught.value, EngineDied)
    engine = Mortal([0])
    with pytest.raises(EngineError, match="max_engine_restarts=0"):
        train(path, tmp_path / "never", engine, max_engine_restarts=0)
    with pytest.raises(ValueError, match=r"data.max_engine_restarts must be at least 0, got -1"):
        train(path, tmp_path, engine, max_engine_restarts=-1)


def test_wrong_weights_are_not_retried(path: Path, tmp_path: Path) -> None:
    engine = Mortal([1], EngineError)
    with pytest.raises(EngineError, match="fell over$"):
        train(path, tmp_path, engine)
    assert engine.num_starts == 1


class Skipping(Mortal):
    """Takes no weights after the first `num_syncs` times; `claims` the version all the same."""

    def __init__(self, num_syncs: int, claims: bool) -> None:
        super().__init__([])
        self.num_syncs, self.claims = num_syncs, claims

    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        self.num_syncs -= 1
        if self.num_syncs >= 0:
            return super().sync(weights, policy_version)
        self.policy_version = policy_version if self.claims else None
        held = self._model.state_dict(keep_vars=True)
        check = SyncCheck(WeightLayout.of(self._model), held if self.claims else {}, torch.float32)
        for _ in check.watch(weights):
            pass
        return SyncReport(0.0, check.finish(held) if self.claims else "")


@pytest.mark.parametrize("claims", [True, False], ids=["by the checksum", "by the version"])
def test_a_skipped_sync_stops_the_run(path: Path, tmp_path: Path, claims: bool) -> None:
    """In float32 at a learning rate of 1e-9, where the log-probabilities are the same."""
    message = "of the engine differs from what was sent" if claims else "version 1 requested, but the engine holds None"
    engine = Skipping(1, claims)
    with pytest.raises(EngineError, match=message):
        train(path, tmp_path, engine, lr=1e-9)
    assert (engine.num_starts, len(engine.sizes)) == (1, 2 + (not claims)), "the second step has no rollouts"
    train(path, tmp_path / "equal", Skipping(1, True), lr=0.0)  # equal weights are no fault


def test_collection_continues_with_the_same_samples(path: Path, tmp_path: Path) -> None:
    def collect(name: str, engine: Mortal) -> list[str]:
        out = tmp_path / name
        options: dict[str, Any] = {"num_questions": 6, "num_traces": None, "verified_only": False, "call_size": 3}
        toy = Toy(lambda question, text: len(text) % 2 == 0)
        Collect(ModelConfig(str(path)), toy, engine, out, sampling=Sampling(max_new_tokens=30), **options).run()
        return [*map(json.dumps, map(json.loads, (out / "traces.jsonl").read_text().splitlines()))]

    engine = Mortal([0, 2])
    assert collect("whole", Mortal([])) == collect("died", engine)
    assert engine.num_starts == 3
    with pytest.raises(EngineError, match="restarted max_engine_restarts=2 times before"):
        collect("always", Mortal(range(100)))


@pytest.mark.parametrize("engine", [TransformersEngine(), ScriptedEngine({})], ids=lambda e: type(e).__name__)
def test_an_engine_that_never_started_can_be_closed(engine: TransformersEngine) -> None:
    engine.close()
    engine.close()
