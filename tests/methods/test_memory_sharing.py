"""Memory of a device that trainer, teacher and engine share: sleeping engines, checkpointed activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdzero.data import Evaluation, RolloutDataModule
from sdzero.engines.base import SyncReport
from sdzero.methods import FinalAnswer, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Rollout, Sampling
from support.helpers import Notes, Toy, fit, make_batch, make_scored

SAMPLING = Sampling(max_new_tokens=30)


class Sleeper(Notes):
    """Like an engine whose weights survive sleep: it keeps its version, and cannot work until it is woken."""

    asleep = False

    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        assert not self.asleep
        return super().sync(weights, policy_version)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, policy_version: int, *rest: Any, **more: Any
    ) -> list[Rollout]:
        assert not self.asleep
        return super().generate(prompts, sampling, seed, policy_version, *rest, **more)

    def sleep(self) -> None:
        self.asleep = True

    def wake(self) -> None:
        self.asleep = False


class Watch(L.Callback):
    def __init__(self, engine: Sleeper) -> None:
        self.engine, self.seen = engine, []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(self.engine.asleep)


def test_asleep_in_every_step_and_awake_for_every_call(path: Path, tmp_path: Path) -> None:
    """Also after a validation, and after a step that was skipped and so left the version as it was."""
    engine = Sleeper(lambda prompt, seed: "1")
    evaluation = Evaluation(num_questions=2, num_samples=2, sampling=SAMPLING)
    data = RolloutDataModule(
        Toy(), engine, 4, 2, sampling=SAMPLING, max_logprob_gap=99, evaluation=evaluation, call_size=2
    )
    method = SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    empty, examples = iter([True, False, False, False]), method.examples
    method.examples = lambda batch: [] if next(empty) else examples(batch)  # the first step is skipped
    watch = Watch(engine)
    fit(method, data, tmp_path, watch, max_epochs=2, val_check_interval=1)
    assert watch.seen == [True] * 4 and method.policy_version == 3
    assert len(engine.calls) == 4 + 4  # a call a step, and one a validation


def test_teacher_contexts_that_do_not_fit_are_counted(path: Path, tmp_path: Path) -> None:
    """Only what a teacher context adds to x and y is not bounded before the run."""
    builder = PromptBuilder.from_pretrained(path)
    questions = [Question("short", "1+1=", "2"), Question("long", "1+1=", "2" * 2000)]
    batch = make_batch([make_scored(builder, question, "2", 1) for question in questions])
    method = SelfDistill(ModelConfig(str(path)), context=FinalAnswer())
    steps = fit(method, [batch], tmp_path)
    assert steps.curve("teacher/too_long") == [1]
    assert steps.curve("budget/tokens_trained") == [2 * 2]  # "2" and the end-of-turn token, student and teacher


class Modes(L.Callback):
    """At every step: who is in training mode, and how often each model's first layer ran."""

    def __init__(self) -> None:
        self.modes: list[tuple[set[bool], set[bool]]] = []
        self.calls = {"student": 0, "teacher": 0}
        self.in_step: list[dict[str, int]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, SelfDistill)
        for name in self.calls:
            layer = getattr(pl_module, name).hf.model.layers[0].self_attn.q_proj

            def count(module: torch.nn.Module, inputs: Any, name: str = name) -> None:
                self.calls[name] += 1

            layer.register_forward_pre_hook(count)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SelfDistill)
        students, teachers = pl_module.student.modules(), pl_module.teacher.modules()
        self.modes.append(({m.training for m in students}, {m.training for m in teachers}))
        self.calls = {"student": 0, "teacher": 0}

    def on_train_batch_end(self, *_: Any) -> None:
        self.in_step.append(dict(self.calls))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_modes_survive_validation_and_checkpointing_is_real(path: Path, tmp_path: Path, checkpointing: bool) -> None:
    """Activations are computed twice only where a backward pass wants them: never the teacher's."""
    sampling = Sampling(max_new_tokens=30)
    evaluation = Evaluation(num_questions=2, num_samples=2, sampling=sampling)
    engine, options = Notes(lambda prompt, seed: f"{seed % 3}"), {"sampling": sampling, "evaluation": evaluation}
    data = RolloutDataModule(Toy(), engine, 6, 2, max_logprob_gap=99, **options)
    method, modes = SelfDistill(ModelConfig(str(path), gradient_checkpointing=checkpointing)), Modes()
    fit(method, data, tmp_path, modes, val_check_interval=1)
    assert modes.modes == [({True}, {False})] * 3
    assert modes.in_step == [{"student": 2 if checkpointing else 1, "teacher": 1}] * 3


def test_checkpointing_changes_no_gradient(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    question, gradients = Question("q", "1+1=", "2"), []
    scored = [make_scored(builder, question, text, reward=r) for r, text in enumerate(("3", "so it is 2"))]
    for checkpointing in (False, True):
        method = SelfDistill(ModelConfig(str(path), gradient_checkpointing=checkpointing))
        gradients.append(fit(method, [make_batch(scored)], tmp_path).gradients[0])
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])
