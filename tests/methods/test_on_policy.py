"""On-policy batches: each is sampled from the weights it trains, and the engine is checked to hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sdzero.data import Evaluation, RolloutDataModule
from sdzero.engines import TransformersEngine
from sdzero.engines.base import EngineError
from sdzero.methods import Method, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Rollout, Sampling
from support.helpers import (
    Notes,
    RecordStudent,
    StaleEngine,
    Toy,
    fit,
    make_batch,
    make_scored,
    plain_logprobs,
    plain_model,
    same,
)

SAMPLING = Sampling(max_new_tokens=30)


def answer(prompt: Prompt, seed: int) -> str:
    return f"the answer is {seed % 3}"


class Sent(Notes):
    """Keeps the weights that each call sampled from."""

    def __init__(self) -> None:
        super().__init__(answer)
        self.sampled_from: list[dict[str, Tensor]] = []

    def generate(self, prompts: Sequence[Prompt], *args: Any, **kwargs: Any) -> list[Rollout]:
        self.sampled_from.append(self.weights)
        return super().generate(prompts, *args, **kwargs)


class RecordPartial(Notes):
    """Could resume a call, as vLLM; records for each call whether it is kept for that."""

    resumes_partial = True

    def __init__(self) -> None:
        super().__init__(answer)
        self.kept: list[tuple[str, bool]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *rest: Any, **more: Any) -> list[Rollout]:
        self.kept.append((prompts[0].question.id.partition("-")[0], len(rest) > 2))  # seed, version, on_tokens
        return super().generate(prompts, sampling, *rest, **more)


def test_a_training_step_keeps_only_whole_calls(path: Path, tmp_path: Path) -> None:
    """Of a call that was cut short the short responses are the finished ones: a step must not lean towards them."""
    engine, evaluation = RecordPartial(), Evaluation(num_questions=2, num_samples=2, sampling=SAMPLING)
    data = RolloutDataModule(Toy(), engine, 4, 2, sampling=SAMPLING, evaluation=evaluation, max_logprob_gap=99)
    fit(SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), data, tmp_path)
    assert engine.kept == [("phase2", False), ("phase2", False), ("eval", True)]


def test_each_batch_is_sampled_from_the_weights_it_trains(path: Path, tmp_path: Path) -> None:
    """Lightning fetches ahead where a loader has no length; here the call comes after the last update."""
    engine, student = Sent(), RecordStudent()
    data = RolloutDataModule(Toy(), engine, 4, 2, sampling=SAMPLING, max_logprob_gap=99)
    method = SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    fit(method, data, tmp_path, student, max_epochs=2)
    assert [version for version, _ in engine.calls] == [0, 1, 2, 3]
    assert student.versions == [(version, version) for version in range(4)]
    assert len(engine.sampled_from) == len(student.weights) == 4
    for sampled_from, trained in zip(engine.sampled_from, student.weights, strict=True):
        assert same(sampled_from, trained)
    for one, next_one in zip(student.weights[:-1], student.weights[1:], strict=True):
        assert not any(torch.equal(one[name], next_one[name]) for name in one)


class NoLength(IterableDataset[Any]):
    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return self.data._batches()


class Ahead(RolloutDataModule):
    """The same stream from a loader that hides its length."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(NoLength(self), batch_size=None)


def test_a_loader_without_length_would_be_off_by_one(path: Path, tmp_path: Path) -> None:
    """Why the stream has a length: without, batch 1 is sampled before step 0, and the step refuses it."""
    engine = Notes(answer)
    data = Ahead(Toy(), engine, 6, 2, sampling=SAMPLING, max_logprob_gap=99)
    method = SelfDistill(ModelConfig(str(path)))
    with pytest.raises(RuntimeError, match="off-policy batch: version 0, student 1"):
        fit(method, data, tmp_path, max_steps=3)
    assert [version for version, _ in engine.calls[:2]] == [0, 0]


@pytest.mark.parametrize(("version", "max_lag"), [(1, 0), (-1, 0), (-2, 1)])
def test_a_batch_of_other_weights_is_refused(
    path: Path, builder: PromptBuilder, tmp_path: Path, version: int, max_lag: int
) -> None:
    """A batch that was generated ahead may lag by its `max_lag`."""
    batch = make_batch([make_scored(builder, Question("q", "1+1=", "2"), "2", reward=1)], version)
    batch.max_lag = max_lag
    with pytest.raises(RuntimeError, match=f"off-policy batch: version {version}, student 0"):
        fit(SelfDistill(ModelConfig(str(path))), [batch], tmp_path)
    batch.policy_version = -max_lag
    fit(SelfDistill(ModelConfig(str(path))), [batch], tmp_path)


def test_policy_logprobs_are_those_of_a_plain_forward_pass(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    question = Question("q", "1+1=", "2")
    rollouts = [make_scored(builder, question, text, 0).rollout for text in ("the answer is 2", "2", "Wait, wait")]
    rollouts.append(replace(rollouts[0], prompt=Prompt(question, rollouts[0].prompt.token_ids[3:])))
    found: list[list[Tensor]] = []

    class Ask(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, Method)
            found.extend(pl_module.policy_logprobs(some) for some in (rollouts, []))

    fit(SelfDistill(ModelConfig(str(path))), [make_batch([])], tmp_path, Ask())
    model = plain_model(path)
    logprobs, of_none = found
    assert of_none == []
    for rollout, ours in zip(rollouts, logprobs, strict=True):
        ids = torch.tensor(rollout.token_ids)
        expected = plain_logprobs(model, rollout.prompt.token_ids, rollout.token_ids).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(ours.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        assert not ours.requires_grad


def test_an_engine_with_the_students_weights_agrees_to_1e_4(path: Path, tmp_path: Path) -> None:
    data = RolloutDataModule(Toy(), TransformersEngine(), 4, 2, sampling=SAMPLING, max_logprob_gap=1e-4)
    method = SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    steps = fit(method, data, tmp_path, max_epochs=2)
    assert all(gap < 1e-4 for gap in steps.curve("rollout/logprob_gap"))


def test_stale_weights_stop_the_run(path: Path, tmp_path: Path) -> None:
    data = RolloutDataModule(Toy(), StaleEngine(), 4, 2, sampling=SAMPLING, max_logprob_gap=0.01)
    method = SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    with pytest.raises(EngineError, match=r"policy version 1 the engine's log-probabilities are .* nats off .*0\.01"):
        fit(method, data, tmp_path)
    assert method.policy_version == 1
