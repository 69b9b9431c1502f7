"""When the student becomes the teacher, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sdzero.callbacks import TeacherSync
from sdzero.data import Evaluation, RolloutDataModule
from sdzero.data.base import stream_loader
from sdzero.methods import SRT, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, RolloutBatch, Sampling, TraceBatch
from support.helpers import Notes, Toy, fit, make_batch, make_scored, make_trace, same, weights_of
from support.tiny_model import write_tiny_model


def stored(builder: PromptBuilder, num_steps: int, skipped: Sequence[int] = ()) -> list[RolloutBatch]:
    """Batches of one response; those at `skipped` hold none."""
    scored = make_scored(builder, Question("q", "1+1=", "2"), "2", reward=1)
    versions = [i - sum(s < i for s in skipped) for i in range(num_steps)]
    return [make_batch([] if i in skipped else [scored], version) for i, version in enumerate(versions)]


class Both(L.Callback):
    """Student and teacher at the start and after every batch. Listed last, as ModelCheckpoint is."""

    def __init__(self) -> None:
        self.student: list[dict[str, Tensor]] = []
        self.teacher: list[dict[str, Tensor]] = []
        self.generations: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, SelfDistill)
        self.student.append(weights_of(pl_module.student))
        self.teacher.append(weights_of(pl_module.teacher))
        self.generations.append(pl_module.teacher_generation)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


class Epochs(L.LightningDataModule):
    """Batches of which every epoch takes the next few."""

    def __init__(self, batches: Sequence[RolloutBatch], steps_per_epoch: int) -> None:
        super().__init__()
        self.rest, self.steps_per_epoch = iter(batches), steps_per_epoch

    def train_dataloader(self) -> DataLoader[Any]:
        return stream_loader(self.steps_per_epoch, lambda: islice(self.rest, self.steps_per_epoch))


def run(path: Path, root: Path, sync: TeacherSync, batches: Sequence[RolloutBatch]) -> Both:
    both = Both()
    method = SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    steps = fit(method, Epochs(batches, 2), root, sync, both, max_epochs=len(batches) // 2)
    assert steps.curve("teacher/generation") == both.generations[1:]
    return both


def copied_at(both: Both) -> list[int]:
    """The batches (from 1) after which the teacher is the student to the bit; elsewhere it must not have moved."""
    copied = []
    for i in range(1, len(both.teacher)):
        if same(both.teacher[i], both.student[i]):
            copied.append(i)
        else:
            assert same(both.teacher[i], both.teacher[i - 1])
    return copied


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_n_steps": 1}, [1, 2, 3, 4, 5, 6]),
        ({"every_n_steps": 2}, [2, 4, 6]),
        ({"every_n_steps": 4}, [4]),
        ({"every_n_epochs": 1}, [2, 4, 6]),
        ({"every_n_epochs": 2}, [4]),
    ],
)
def test_the_teacher_is_copied_when_it_is_due(
    path: Path, builder: PromptBuilder, tmp_path: Path, options: dict[str, Any], expected: list[int]
) -> None:
    both = run(path, tmp_path, TeacherSync(**options), stored(builder, 6))
    assert copied_at(both) == expected
    assert both.generations == [sum(e <= i for e in expected) for i in range(7)]


def test_a_skipped_batch_is_no_step(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    """Steps count optimizer steps: after the skipped batch 3 the teacher of step 2 is not copied a second time."""
    both = run(path, tmp_path, TeacherSync(every_n_steps=2), stored(builder, 6, skipped=[2]))
    assert both.generations == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_ema_averages_the_student_in_after_every_step(
    path: Path, builder: PromptBuilder, tmp_path: Path, decay: float
) -> None:
    both = run(path, tmp_path, TeacherSync(ema_decay=decay), stored(builder, 4, skipped=[1]))
    expected = both.teacher[0]
    for i in (1, 2, 3, 4):
        if i != 2:  # the skipped batch
            student = both.student[i]
            expected = {name: decay * expected[name] + (1 - decay) * student[name] for name in expected}
        for name, weight in both.teacher[i].items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_a_plateau_is_validations_without_a_rise(path: Path, tmp_path: Path) -> None:
    """Accuracies 0 0 0 | 1 1 0 | 1 with a patience of 2: two runs of two validations that do not rise."""
    accuracy = {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 0, 7: 1}

    def respond(prompt: Prompt, seed: int) -> str:
        held_out = prompt.question.id.startswith("eval") and accuracy[engine.policy_version or 0]
        return prompt.question.answer if held_out else "?"

    engine, sampling = Notes(respond), Sampling(max_new_tokens=4)
    evaluation = Evaluation(num_questions=1, num_samples=1, sampling=sampling)
    data = RolloutDataModule(Toy(), engine, 7, 1, sampling=sampling, evaluation=evaluation, max_logprob_gap=99)
    method, both = SelfDistill(ModelConfig(str(path))), Both()
    sync = TeacherSync(plateau_monitor="eval/avg_at_k", plateau_patience=2)
    fit(method, data, tmp_path, sync, both, val_check_interval=1)
    assert both.generations == [0, 0, 0, 0, 1, 1, 1, 2]  # before the validation of each step
    assert method.teacher_generation == 2
    assert same(both.teacher[4], both.student[3]) and same(both.teacher[7], both.student[6])


def test_a_plateau_needs_a_metric_that_is_logged(path: Path, tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=4)
    evaluation = Evaluation(num_questions=1, num_samples=1, sampling=sampling)
    data = RolloutDataModule(
        Toy(), Notes(lambda p, s: "?"), 1, 1, sampling=sampling, evaluation=evaluation, max_logprob_gap=99
    )
    with pytest.raises(ValueError, match=r"plateau_monitor 'eval/accuracy' is not logged.*'eval/avg_at_k'"):
        fit(SelfDistill(ModelConfig(str(path))), data, tmp_path, TeacherSync(plateau_monitor="eval/accuracy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set one of"),
        ({"every_n_steps": 1, "every_n_epochs": 1}, "set one of"),
        ({"every_n_steps": 1, "ema_decay": 0.5}, "set one of"),
        ({"every_n_steps": 0}, "at least 1"),
        ({"every_n_epochs": -1}, "at least 1"),
        ({"plateau_monitor": "x", "plateau_patience": 0}, "at least 1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": -0.1}, "ema_decay"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherSync(**options)


def test_a_method_without_a_teacher_is_refused(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    batch = TraceBatch([make_trace(builder, "q", None, "2", reward=None)], 0)
    with pytest.raises(TypeError, match="a method with a teacher, not SRT"):
        fit(SRT(ModelConfig(str(path))), [batch], tmp_path, TeacherSync(every_n_steps=1))


def test_a_teacher_that_cannot_take_the_student_is_refused(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    larger = write_tiny_model(tmp_path / "larger", num_hidden_layers=2, hidden_size=32)
    method = SelfDistill(ModelConfig(str(path)), teacher=ModelConfig(str(larger)))
    with pytest.raises(ValueError, match="teacher and student have different shapes"):
        fit(method, stored(builder, 1), tmp_path, TeacherSync(every_n_steps=1))
    method = SelfDistill(ModelConfig(str(path)), teacher=ModelConfig(str(path), dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"ema_decay.*teacher\.dtype=float32"):
        fit(method, stored(builder, 1), tmp_path, TeacherSync(ema_decay=0.999))
