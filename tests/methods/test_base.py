"""One batch is one optimizer step: its learning rate, its clipping, its precision, and steps that are not taken."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from sdzero.data import RolloutDataModule
from sdzero.methods import SRT, Method, Schedule, SelfDistill
from sdzero.methods.base import NonFiniteError
from sdzero.models.language_model import ModelConfig, load
from sdzero.prompts import PromptBuilder
from sdzero.types import Example, LossOutput, Prompt, Question, Sampling, TraceBatch
from support.helpers import (
    Notes,
    Stored,
    Toy,
    fit,
    make_batch,
    make_scored,
    make_trace,
    make_trainer,
    same,
    weights_of,
)


@pytest.fixture(scope="module")
def batches(builder: PromptBuilder) -> list[TraceBatch]:
    """Three steps of two traces each."""
    traces = [make_trace(builder, f"q{i}", "1+1=3", f"1+1={i}", reward=i % 2) for i in range(6)]
    return [TraceBatch(traces[2 * i : 2 * i + 2], i) for i in range(3)]


def sgd(lr: float) -> dict[str, Any]:
    return {"optimizer": lambda p: torch.optim.SGD(p, lr=lr)}


# --- the learning rate ----------------------------------------------------------------------------


def expected_lr(name: str, step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / (total - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[name]


@pytest.mark.parametrize("warmup", [{"warmup_steps": 3}, {"warmup_ratio": 0.5}, {}])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_learning_rate_moves_every_step(
    path: Path, batches: list[TraceBatch], tmp_path: Path, name: Any, warmup: dict[str, Any]
) -> None:
    """Over two epochs of three steps: an epoch neither holds it still nor starts it again."""
    method = SRT(ModelConfig(str(path)), schedule=Schedule(name, **warmup), **sgd(0.25))
    steps = fit(method, batches, tmp_path, max_epochs=2)
    num_warmup = 3 if warmup else 0
    expected = [0.25 * expected_lr(name, step, num_warmup, 6) for step in range(6)]
    assert steps.curve("train/lr") == pytest.approx(expected)


def test_warmup_is_set_once() -> None:
    with pytest.raises(ValueError, match="warmup_steps or warmup_ratio"):
        Schedule(warmup_steps=3, warmup_ratio=0.1)


# --- clipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_to_the_norm(
    path: Path, batches: list[TraceBatch], tmp_path: Path, max_grad_norm: float
) -> None:
    """The logged norm is the one before; 0 clips nothing."""
    method = SRT(ModelConfig(str(path)), max_grad_norm=max_grad_norm, **sgd(0.0))
    steps = fit(method, batches[:1], tmp_path)
    seen = torch.cat([g.flatten() for g in steps.gradients[0].values()]).norm().item()
    unclipped = steps.curve("train/grad_norm")[0]
    assert unclipped > 0.1
    assert seen == pytest.approx(0.01 if max_grad_norm == 0.01 else unclipped, rel=1e-3)


# --- precision ------------------------------------------------------------------------------------


PRECISIONS = ["bf16-true", "16-true", "16-mixed", "transformer-engine", "transformer-engine-float16"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_16_bits_are_refused(
    path: Path, batches: list[TraceBatch], tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = {"precision": precision} if precision == "bf16-true" else {}  # most cannot be built without a GPU
    trainer = make_trainer(tmp_path, **real)
    monkeypatch.setattr(trainer.precision_plugin, "precision", precision)
    with pytest.raises(ValueError, match=rf"trainer\.precision={precision}.*bf16-mixed.*32-true"):
        trainer.fit(SRT(ModelConfig(str(path))), datamodule=Stored(batches))


class Products(L.Callback):
    """The dtypes that come out of a projection of the student."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        layer = pl_module.student.hf.model.layers[0].self_attn.q_proj  # pyright: ignore
        layer.register_forward_hook(lambda module, inputs, output: self.dtypes.add(output.dtype))


def test_bf16_mixed_computes_in_bfloat16_and_keeps_float32(
    path: Path, batches: list[TraceBatch], tmp_path: Path
) -> None:
    products = Products()
    method = SRT(ModelConfig(str(path)))
    steps = fit(method, batches[:1], tmp_path, products, precision="bf16-mixed")
    assert products.dtypes == {torch.bfloat16}
    optimizer = method.optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    moments = {v.dtype for state in optimizer.state.values() for k, v in state.items() if k.startswith("exp_avg")}
    assert {p.dtype for p in method.student.parameters()} == moments == {torch.float32}
    exact = fit(SRT(ModelConfig(str(path))), batches[:1], tmp_path)
    assert steps.curve("train/loss")[0] == pytest.approx(exact.curve("train/loss")[0], rel=0.02)
    assert steps.curve("train/loss") != exact.curve("train/loss")
    assert not same(weights_of(method.student), weights_of(load(ModelConfig(str(path)), 0)))


# --- steps that are not taken ---------------------------------------------------------------------


class Broken(SRT):
    """Its loss (or only its gradient) is no number at batch 1."""

    def __init__(self, *args: Any, fault: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fault = fault

    def loss(self, examples: Sequence[Example], counts: Sequence[float], precomputed: None = None) -> LossOutput:
        output = super().loss(examples, counts)
        if not any(e.id == "q2" for e in examples):
            return output
        if self.fault == "loss":
            return LossOutput(output.loss * torch.nan, output.metrics)
        return LossOutput(Explode.apply(output.loss), output.metrics)  # pyright: ignore[reportArgumentType]


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * torch.inf


FAULTS = ["loss", "gradient"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_nonfinite_step_stops_the_run(path: Path, batches: list[TraceBatch], tmp_path: Path, fault: str) -> None:
    method = Broken(ModelConfig(str(path)), fault=fault, **sgd(0.1))
    with pytest.raises(NonFiniteError) as error:
        fit(method, batches, tmp_path)
    assert "step 1:" in str(error.value) and "['q2', 'q3']" in str(error.value)
    assert "max_nonfinite_steps=0" in str(error.value)
    kept = torch.load(re.findall(r"torch.load\('(.*)'\)", str(error.value))[0])
    assert [Example(**row) for row in kept["examples"]] == method.examples(batches[1])
    assert kept["denominators"] == method.loss_denominators(method.examples(batches[1]))
    assert (kept["step"], kept["rank"]) == (1, 0)
    assert not all(math.isfinite(kept["metrics"][name]) for name in ("loss", "grad_norm"))
    assert (method.policy_version, method.num_nonfinite) == (1, 1)
    assert all(torch.isfinite(w).all() for w in weights_of(method.student).values())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_nonfinite_step_is_skipped_and_counted(
    path: Path, batches: list[TraceBatch], tmp_path: Path, fault: str
) -> None:
    """Weights, optimizer and schedule end as if that batch had never been."""
    options: dict[str, Any] = {"schedule": Schedule(warmup_steps=2)}
    method = Broken(ModelConfig(str(path)), fault=fault, max_nonfinite_steps=1, **options)
    steps = fit(method, batches, tmp_path)
    assert steps.curve("train/nonfinite") == [0, 1, 1]
    assert method.policy_version == method.trainer.global_step == 2
    without = SRT(ModelConfig(str(path)), **options)
    expected = fit(without, [batches[0], batches[2]], tmp_path)
    assert same(weights_of(method.student), weights_of(without.student))
    lrs = steps.curve("train/lr")
    assert [lrs[0], lrs[2]] == expected.curve("train/lr")


def test_a_run_stops_after_the_allowed_number_of_nonfinite_steps(
    path: Path, batches: list[TraceBatch], tmp_path: Path
) -> None:
    method = Broken(ModelConfig(str(path)), fault="loss", max_nonfinite_steps=1, **sgd(0.1))
    with pytest.raises(NonFiniteError, match="step 3:"):
        fit(method, batches, tmp_path, max_epochs=2)
    assert method.num_nonfinite == 2


def test_a_nan_weight_stops_the_run(path: Path, batches: list[TraceBatch], tmp_path: Path) -> None:
    class Spoil(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            with torch.no_grad():
                next(pl_module.parameters())[0, 0] = torch.nan

    with pytest.raises(NonFiniteError, match="step 0: loss nan"):
        fit(SRT(ModelConfig(str(path))), [TraceBatch(batches[0].traces, 0)], tmp_path, Spoil())


def test_batches_without_a_target_are_skipped(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    """Empty responses train nothing; the weights, the schedule and the policy's version stay."""
    question = Question("q", "1+1=", "2")
    full = make_scored(builder, question, "the answer is 2", reward=1)
    empty = replace(full, rollout=replace(full.rollout, token_ids=(), logprobs=()))
    method = SelfDistill(ModelConfig(str(path)), schedule=Schedule(warmup_steps=4), **sgd(0.1))
    batches = [make_batch(b, v) for b, v in (([full], 0), ([empty, empty], 1), ([], 1), ([full], 1), ([empty], 2))]
    steps = fit(method, batches, tmp_path)
    assert len(steps.gradients) == method.policy_version == method.trainer.global_step == 2
    assert steps.curve("train/lr")[3] == pytest.approx(0.1 / 4)
    assert [m.get("train/skipped") for m in steps.metrics] == [None, 1, 2, 2, 1]
    assert method.num_generations == 5
    assert method.num_tokens_sampled == 2 * len(full.rollout.token_ids)


def test_too_many_skipped_batches_stop_the_run(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    cut = make_scored(builder, Question("q", "1+1=", "2"), "the answer", reward=0, cut=True)
    method = SelfDistill(ModelConfig(str(path)), mask_truncated=True, max_skipped_steps=2)
    with pytest.raises(RuntimeError, match="3 consecutive batches had no target token"):
        fit(method, [make_batch([cut])] * 4, tmp_path)
    assert method.policy_version == 0


def test_skipped_batches_are_followed_by_other_questions(path: Path, tmp_path: Path) -> None:
    """Every response is cut: the counter goes on, the engine keeps its version, and no question comes twice."""
    engine = Notes(lambda prompt, seed: "on and on and on")
    data = RolloutDataModule(Toy(), engine, 6, 2, sampling=Sampling(max_new_tokens=4), max_logprob_gap=99)
    method = SelfDistill(ModelConfig(str(path)), mask_truncated=True)
    fit(method, data, tmp_path)
    assert [version for version, _ in engine.calls] == [0, 0, 0]
    assert len({prompt.question.id for _, prompts in engine.calls for prompt in prompts}) == 6
    assert (method.policy_version, method.num_skipped, engine.num_syncs) == (0, 3, 1)


# --- the budget -----------------------------------------------------------------------------------


def test_the_budget_counts_generations_and_tokens(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    """Table 3: what was sampled, and what was trained on, the teacher's pass included."""

    def respond(prompt: Prompt, seed: int) -> str:
        return "7" * (1 + int(prompt.question.answer))

    data = RolloutDataModule(
        Toy(), Notes(respond), 4, 2, rollouts_per_prompt=3, sampling=Sampling(max_new_tokens=4), max_logprob_gap=99
    )
    method = SelfDistill(ModelConfig(str(path)), mask_truncated=True)
    steps = fit(method, data, tmp_path, max_epochs=2)
    lengths = {"1": 3, "2": 4, "3": 4, "4": 4}  # with the end-of-turn token; those of 3 and 4 are cut
    assert method.num_generations == 2 * 4 * 3
    assert method.num_tokens_sampled == 2 * 3 * sum(lengths.values())
    assert method.num_tokens_trained == 2 * (2 * 3 * (lengths["1"] + lengths["2"]))
    assert steps.curve("budget/generations")[-1] == method.num_generations
    assert sum(steps.curve("rollout/truncated")) == pytest.approx(4 * 0.5)
    assert sum(steps.curve("rollout/length")) == pytest.approx(2 * sum(lengths.values()) / 2)


def test_the_base_class_is_abstract(path: Path) -> None:
    with pytest.raises(TypeError, match="abstract method"):
        Method(ModelConfig(str(path)))  # pyright: ignore[reportAbstractUsage]
