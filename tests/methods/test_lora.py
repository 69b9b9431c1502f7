"""Training of adapters: the base never moves and is the teacher, and the engine receives the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdzero.callbacks import TeacherSync, TokenKLRecorder
from sdzero.data import RolloutDataModule
from sdzero.engines import TransformersEngine
from sdzero.engines.base import EngineError
from sdzero.losses import Divergence
from sdzero.methods import SRT, Method, SelfDistill
from sdzero.models.language_model import ModelConfig, load
from sdzero.models.lora import AdaptersOff, Lora
from sdzero.models.weights import full_weights
from sdzero.prompts import PromptBuilder
from sdzero.types import Question, Sampling, ScoredRollout, TraceBatch
from support.helpers import (
    Notes,
    Steps,
    Toy,
    fit,
    make_batch,
    make_scored,
    make_trace,
    plain_logprobs,
    plain_model,
    read_by_hand,
    same,
    weights_of,
)

LORA = Lora(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def scored(builder: PromptBuilder) -> list[ScoredRollout]:
    texts = ("the answer is 3", "2", "Wait, it is 4")
    return [make_scored(builder, Question(f"q{i}", "1+1=", "2"), text, reward=i % 2) for i, text in enumerate(texts)]


def config(path: Path, **options: Any) -> ModelConfig:
    return ModelConfig(str(path), lora=LORA, **options)


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda p: torch.optim.SGD(p, lr=lr)


def batches(scored: Sequence[ScoredRollout], num_steps: int) -> list[Any]:
    return [make_batch(scored, version) for version in range(num_steps)]


def base_of(method: Method) -> dict[str, Tensor]:
    """The frozen weights by their names in the model's folder."""
    assert isinstance(method.student, nn.Module)
    frozen = {n: p for n, p in weights_of(method.student).items() if ".lora_" not in n}
    return {name.removeprefix("hf.").replace(".base_layer.", "."): p for name, p in frozen.items()}


def only_adapters_train(method: Method, steps: Steps, path: Path) -> None:
    assert all(gradients and all(".lora_" in name for name in gradients) for gradients in steps.gradients)
    assert all(gradient.any() for gradient in steps.gradients[-1].values())  # of A too: B is zero no more
    assert same(base_of(method), weights_of(load(ModelConfig(str(path)), 0).hf))


def test_self_distillation_moves_only_adapters(path: Path, scored: list[ScoredRollout], tmp_path: Path) -> None:
    method = SelfDistill(config(path), optimizer=sgd(1.0))
    steps = fit(method, batches(scored, 3), tmp_path)
    only_adapters_train(method, steps, path)
    merged, base = dict(full_weights(method.student)), base_of(method)
    assert sum(not torch.equal(merged[name], base[name]) for name in base) == 2 * 7
    assert not any(name.startswith("teacher.") for name in method.state_dict())


def test_srt_moves_only_adapters(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    traces = [make_trace(builder, f"q{i}", "1+1=3", "1+1=2", reward=i) for i in (0, 1)]
    method = SRT(config(path), optimizer=sgd(1.0))
    steps = fit(method, [TraceBatch(traces, 0), TraceBatch(traces, 1)], tmp_path)
    only_adapters_train(method, steps, path)
    assert steps.curve("train/loss")[1] < steps.curve("train/loss")[0]


def test_the_first_steps_divergence_is_that_of_the_contexts(
    path: Path, builder: PromptBuilder, scored: list[ScoredRollout], tmp_path: Path
) -> None:
    """Student and teacher are one model then: full float64 logits of the folder are the reference."""
    steps = fit(SelfDistill(config(path)), batches(scored, 1), tmp_path)
    model, total, num = plain_model(path), 0.0, 0
    for one in scored:
        target = one.rollout.token_ids
        student = plain_logprobs(model, one.rollout.prompt.token_ids, target)
        teacher = plain_logprobs(model, read_by_hand(builder, one), target)
        total += float((student.exp() * (student - teacher)).sum())
        num += len(target)
    assert steps.curve("train/loss")[0] == pytest.approx(total / num, rel=1e-5)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the method, of the model
    "plain": ({}, {}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "teacher_first": ({"teacher_first": True}, {}),
    "top_k": ({"teacher_first": True, "divergence": Divergence(top_k=5)}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_teaches_like_a_copy_of_it(
    path: Path, scored: list[ScoredRollout], tmp_path: Path, variant: str
) -> None:
    """Bit for bit, over several micro batches and steps, and in what the recorder reads."""
    options, model_options = VARIANTS[variant]
    options = {"optimizer": sgd(1.0), "max_tokens_per_micro_batch": 1, **options}
    runs = []
    for teacher in (None, ModelConfig(str(path))):
        method = SelfDistill(config(path, **model_options), teacher=teacher, **options)
        recorder = TokenKLRecorder(every_n_steps=1)
        seen: list[list[dict[str, Any]]] = []
        recorder._write = lambda trainer, module, kind, r=recorder, s=seen: (s.append(r.rows), setattr(r, "rows", []))  # pyright: ignore
        runs.append((method, fit(method, batches(scored, 3), tmp_path, recorder), seen))
    (shared, steps, rows), (_, expected, expected_rows) = runs
    assert isinstance(shared.teacher, AdaptersOff) and shared.teacher_and_context()[0] is shared.teacher
    for ours, theirs in zip(steps.gradients, expected.gradients, strict=True):
        assert same(ours, theirs)
    assert rows == expected_rows and len(rows) == 3 and len(rows[0]) == 3
    names = ("train/loss", "teacher/kl_r0", "teacher/token_kl_reward_r1")
    assert all(steps.curve(name) == expected.curve(name) for name in names)


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_teachers_weights_stay_where_the_students_are(
    path: Path, scored: list[ScoredRollout], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """On a GPU another teacher leaves it between its passes."""
    method = SelfDistill(config(path), teacher_first=True, teacher=None if shared else ModelConfig(str(path)))
    fit(method, batches(scored, 1), tmp_path)
    monkeypatch.setattr(SelfDistill, "device", property(lambda self: torch.device("cuda")))
    assert method._teacher_moves == (not shared)


# --- another teacher ------------------------------------------------------------------------------


def test_a_shared_teacher_cannot_be_synchronised(path: Path, scored: list[ScoredRollout], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"TeacherSync: the teacher is the student without its adapters"):
        fit(SelfDistill(config(path)), batches(scored, 1), tmp_path, TeacherSync(every_n_steps=1))


def test_a_teacher_without_adapters_cannot_take_the_students(
    path: Path, scored: list[ScoredRollout], tmp_path: Path
) -> None:
    method = SelfDistill(config(path), teacher=ModelConfig(str(path)))
    with pytest.raises(ValueError, match="teacher and student have different shapes"):
        fit(method, batches(scored, 1), tmp_path, TeacherSync(every_n_steps=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sync", [{"every_n_steps": 1}, {"ema_decay": 0.75}], ids=["copy", "ema"])
def test_a_teacher_with_adapters_of_its_own_follows_the_student(
    path: Path, scored: list[ScoredRollout], tmp_path: Path, sync: dict[str, Any], dtype: Any
) -> None:
    """In float32, whatever the dtype of the weights beside them."""
    model = config(path, dtype=dtype)
    method = SelfDistill(model, teacher=model, optimizer=sgd(0.5))
    start = weights_of(load(model, 0))
    precision = "bf16-mixed" if dtype == "bfloat16" else "32-true"
    fit(method, batches(scored, 1), tmp_path, TeacherSync(**sync), precision=precision)
    student, teacher = weights_of(method.student), weights_of(method.teacher)
    if "ema_decay" in sync:
        expected = {name: start[name].lerp(student[name], 0.25) for name in start}
        assert same(teacher, expected) and not same(teacher, student) and not same(teacher, start)
    else:
        assert same(teacher, student) and not same(teacher, start)


# --- dtypes ---------------------------------------------------------------------------------------


def test_a_bfloat16_base_needs_a_bfloat16_computation(path: Path, scored: list[ScoredRollout], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"require trainer\.precision=bf16-mixed"):
        fit(SelfDistill(config(path, dtype="bfloat16")), batches(scored, 1), tmp_path)
    with pytest.raises(ValueError, match="trained weights must be float32"):
        fit(SelfDistill(ModelConfig(str(path), dtype="bfloat16")), batches(scored, 1), tmp_path, precision="bf16-mixed")
    method = SelfDistill(config(path, dtype="bfloat16"), optimizer=sgd(1.0))
    steps = fit(method, batches(scored, 2), tmp_path, precision="bf16-mixed")
    assert {g.dtype for g in steps.gradients[-1].values()} == {torch.float32}
    assert same(base_of(method), weights_of(load(ModelConfig(str(path), dtype="bfloat16"), 0).hf))


# --- the engine -----------------------------------------------------------------------------------


class Forgetful(TransformersEngine):
    """From the second sync on, one layer's new weight does not arrive."""

    def sync(self, weights: Any, policy_version: int) -> Any:
        held = self._model.get_parameter("model.layers.1.self_attn.q_proj.weight")
        keep = held.detach().clone()

        def losing() -> Any:
            yield from weights
            if policy_version:
                held.data.copy_(keep)

        return super().sync(losing(), policy_version)


def rollouts(engine: Any, lr: float, path: Path) -> tuple[Method, RolloutDataModule]:
    data = RolloutDataModule(Toy(), engine, 6, 2, sampling=Sampling(max_new_tokens=12), max_logprob_gap=1e-4)
    return SelfDistill(config(path), optimizer=sgd(lr)), data


def test_the_engine_samples_from_what_was_trained(path: Path, tmp_path: Path) -> None:
    """Its log-probabilities are the adapted model's, within float32, while that moves away from the base."""
    method, data = rollouts(TransformersEngine(), 1.0, path)
    steps = fit(method, data, tmp_path)
    assert max(steps.curve("rollout/logprob_gap")) < 1e-5
    only_adapters_train(method, steps, path)
    engine = Notes(lambda prompt, seed: "2")
    engine.weights = {name: tensor.clone() for name, tensor in full_weights(method.student)}
    assert engine.weights.keys() == base_of(method).keys() and not same(engine.weights, base_of(method))


def test_a_layer_without_its_adapter_is_detected(path: Path, tmp_path: Path) -> None:
    """At a learning rate whose step no log-probability shows."""
    with pytest.raises(EngineError, match=r"'model\.layers\.1\.self_attn\.q_proj\.weight' of the engine differs"):
        fit(*rollouts(Forgetful(), 1e-3, path), tmp_path)
