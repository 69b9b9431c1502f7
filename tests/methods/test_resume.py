"""Resumed runs: a run stopped after any step ends bit for bit as an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sdzero.callbacks import TeacherSync
from sdzero.data import Evaluation, RolloutDataModule, TraceDataModule
from sdzero.data.base import StepDataModule
from sdzero.engines import TransformersEngine
from sdzero.methods import SRT, Method, Schedule, SelfDistill
from sdzero.methods.base import FAULTS
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.tasks.base import TraceSource
from sdzero.trainer.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from sdzero.types import BUDGET, Sampling, Trace
from support.helpers import Steps, Toy, make_trace, make_trainer, same, weights_of

NUM_STEPS = 6  # two epochs of three
SYNCS: dict[str, tuple[dict[str, Any], list[int | None]]] = {
    "frozen": ({}, [None] * 6),
    "steps": ({"every_n_steps": 2}, [0, 1, 1, 2, 2, 3]),
    "epochs": ({"every_n_epochs": 1}, [0, 0, 1, 1, 1, 2]),
    "ema": ({"ema_decay": 0.7}, [0] * 6),
    "plateau": (
        {"plateau_monitor": "train/nonfinite", "plateau_patience": 1},
        [0] * 6,
    ),  # never rises: due after step 6
}


class Demonstrations(TraceSource):
    def traces(self, builder: PromptBuilder) -> list[Trace]:
        return [make_trace(builder, f"q{i}", "1+1=3", f"1+1={i}", reward=i % 2) for i in range(5)]


def self_distill(path: Path, **options: Any) -> tuple[Method, StepDataModule]:
    """Some responses are right, some wrong, some cut; five questions, so the last batch of an epoch is short."""
    sampling = Sampling(max_new_tokens=12)
    evaluation = Evaluation(num_questions=2, num_samples=2, sampling=sampling)
    task = Toy(lambda question, text: len(text) % 2 == 0)
    engine = TransformersEngine()
    data = RolloutDataModule(
        task, engine, 5, 2, sampling=sampling, max_logprob_gap=1e-3, evaluation=evaluation, rollouts_per_prompt=2
    )
    return SelfDistill(ModelConfig(str(path)), **OPTIONS, **options), data


def srt(path: Path) -> tuple[Method, StepDataModule]:
    return SRT(ModelConfig(str(path)), **OPTIONS), TraceDataModule(Demonstrations(), traces_per_step=2)


OPTIONS: dict[str, Any] = {
    "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "schedule": Schedule("cosine", warmup_steps=2),
    "max_tokens_per_micro_batch": 150,
}
Make = Callable[[Path], tuple[Method, StepDataModule]]


def state(method: Method) -> dict[str, Any]:
    return {name: getattr(method, name, None) for name in ("policy_version", "teacher_generation", *BUDGET, *FAULTS)}


class Run:
    """A fit of NUM_STEPS steps, from its beginning or from a checkpoint, with objects of its own."""

    def __init__(
        self,
        make: Make,
        path: Path,
        root: Path,
        sync: dict[str, Any],
        checkpoint: Path | None = None,
        keep: tuple[L.Callback, ...] = (),
    ) -> None:
        self.method, data = make(path)
        callbacks: list[L.Callback] = [TeacherSync(**sync)] if sync else []
        keep = keep or (ModelCheckpoint(root / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1),)
        steps = Steps()
        options = {"max_steps": NUM_STEPS, "max_epochs": None, "plugins": [AtomicCheckpointIO()]}
        trainer = make_trainer(root, *callbacks, *keep, steps, enable_checkpointing=True, **options)
        trainer.fit(self.method, datamodule=data, ckpt_path=checkpoint, weights_only=False)
        self.lrs = [m["train/lr"] for m in steps.metrics if "train/lr" in m]
        self.generations = [m.get("teacher/generation") for m in steps.metrics]
        self.weights: dict[str, Tensor] = weights_of(self.method)  # the student's and the teacher's
        self.moments: dict[int, dict[str, Tensor]] = trainer.optimizers[0].state_dict()["state"]
        self.position = (data.counter, trainer.global_step, trainer.current_epoch)


def check_every_stop(make: Make, path: Path, root: Path, sync: dict[str, Any]) -> Run:
    """Each checkpoint of a whole run is what a kill after that step leaves."""
    whole = Run(make, path, root / "whole", sync)
    for stop in range(1, NUM_STEPS):
        if stop == 3 and "plateau_monitor" in sync:
            continue  # Lightning saves before the validation of that step, and does not make up for it
        checkpoint = root / "whole" / "checkpoints" / f"step={stop}.ckpt"
        resumed = Run(make, path, root / f"from{stop}", sync, checkpoint)
        assert same(resumed.weights, whole.weights), stop
        assert all(same(resumed.moments[key], moments) for key, moments in whole.moments.items()), stop
        assert resumed.position == whole.position, stop
        assert state(resumed.method) == state(whole.method), stop
        assert resumed.lrs == whole.lrs[-len(resumed.lrs) :] and resumed.lrs, stop
        assert resumed.generations == whole.generations[-len(resumed.generations) :], stop
    return whole


@pytest.mark.parametrize("name", SYNCS)
def test_self_distill_resumes_bitwise(path: Path, tmp_path: Path, name: str) -> None:
    """After every step of two epochs, the last of an epoch included; the teacher moves on as it would have."""
    sync, generations = SYNCS[name]
    whole = check_every_stop(self_distill, path, tmp_path, sync)
    assert whole.position == (6, 6, 2)
    assert whole.generations == generations
    teacher = {k: v for k, v in whole.weights.items() if k.startswith("teacher.")}
    student = {k.replace("student.", "teacher."): v for k, v in whole.weights.items() if k.startswith("student.")}
    assert same(teacher, student) == (name in ("steps", "epochs", "plateau"))


def test_skipped_batches_are_followed_by_the_same_batches(path: Path, tmp_path: Path) -> None:
    """A batch of cut responses takes no step and synchronises nothing, but moves the counter."""

    def make(path: Path) -> tuple[Method, StepDataModule]:
        method, data = self_distill(path, mask_truncated=True, max_skipped_steps=100)
        assert isinstance(data, RolloutDataModule)
        data.items_per_step, data.sampling = 1, Sampling(max_new_tokens=30)
        return method, data

    whole = check_every_stop(make, path, tmp_path, {"every_n_steps": 2})
    counter, global_step, _ = whole.position
    assert counter > global_step == NUM_STEPS  # there were such batches


def test_srt_resumes_bitwise(path: Path, tmp_path: Path) -> None:
    check_every_stop(srt, path, tmp_path, {})


def test_finished_calls_are_not_sampled_again(path: Path, tmp_path: Path) -> None:
    """In the folder of the stopped run the call of the step that was lost is read from the journal."""
    whole = Run(self_distill, path, tmp_path, {})
    calls = tmp_path / "journal/rank0/calls.log"
    started = calls.read_text()
    again = Run(self_distill, path, tmp_path, {}, tmp_path / "checkpoints/step=5.ckpt")
    assert same(again.weights, whole.weights)
    assert calls.read_text() == started


KEEP_BEST = Path(__file__).parents[2] / "configs/trainer/keep_best.yaml"


def test_the_best_is_kept_beside_the_newest_two(path: Path, tmp_path: Path) -> None:
    """Validation is rarer than saving; both kinds are saved after step 3; a run goes on from each, to the bit."""
    (overlay,) = yaml.safe_load(KEEP_BEST.read_text())["trainer"]["callbacks+"]
    assert overlay["class_path"] == "lightning.pytorch.callbacks.ModelCheckpoint"
    folder, sync = tmp_path / "kept/checkpoints", {"every_n_steps": 2}
    best = ModelCheckpoint(folder, **overlay["init_args"])
    last = ModelCheckpoint(folder, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=1)
    whole = Run(self_distill, path, tmp_path / "kept", sync, None, (last, best))
    assert sorted(file.name for file in folder.glob("*.ckpt")) == ["best-step=3.ckpt", "step=5.ckpt", "step=6.ckpt"]
    assert newest_checkpoint(folder) == folder / "step=6.ckpt"
    for name in ("best-step=3", "step=5"):
        resumed = Run(self_distill, path, tmp_path / f"from-{name}", sync, folder / f"{name}.ckpt")
        assert same(resumed.weights, whole.weights) and resumed.position == whole.position, name
        assert state(resumed.method) == state(whole.method), name
