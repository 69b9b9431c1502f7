"""A fit that a signal ends goes on as if there had been none: the same weights, metrics and teacher, to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sdzero.callbacks import Preemption, TeacherSync, preemption
from sdzero.data import Evaluation, RolloutDataModule
from sdzero.engines import TransformersEngine
from sdzero.methods import SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.trainer.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from sdzero.types import Prompt, Rollout, Sampling
from sdzero.utils.process import Stopped, handle_signals
from support.helpers import Curves, Toy, make_trainer, same, weights_of

NUM_STEPS, VALIDATED = 6, 2  # two epochs of three steps; after every second step a validation of two calls
CALLS_PER_ROUND = 2 + 2  # two steps' rollouts and a validation's calls


class Signalled(TransformersEngine):
    """Sends its process signals before the calls of the given numbers, counted from 0."""

    def __init__(self, signals: dict[int, int]) -> None:
        super().__init__()
        self.signals, self.num_calls = signals, 0

    def generate(self, prompts: Sequence[Prompt], *rest: Any, **more: Any) -> list[Rollout]:
        if self.num_calls in self.signals:
            os.kill(os.getpid(), self.signals[self.num_calls])
        self.num_calls += 1
        return super().generate(prompts, *rest, **more)


class Fit:
    """A fit in `root`, from the newest checkpoint there; `code` is what it ended with."""

    def __init__(self, path: Path, root: Path, signals: dict[int, int] | None = None, *callbacks: L.Callback) -> None:
        sampling = Sampling(max_new_tokens=12)
        evaluation = Evaluation(num_questions=4, num_samples=1, sampling=sampling, call_size=2)
        self.engine = Signalled(signals or {})
        toy = Toy(lambda question, text: len(text) % 2 == 0)
        data = RolloutDataModule(toy, self.engine, 5, 2, sampling=sampling, evaluation=evaluation, max_logprob_gap=1e-3)
        self.method = SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        self.curves, self.saved = Curves(), newest_checkpoint(root / "checkpoints")
        trainer = make_trainer(
            root,
            TeacherSync(plateau_monitor="eval/avg_at_k", plateau_patience=1),
            ModelCheckpoint(root / "checkpoints", "{step}", every_n_train_steps=4),
            *callbacks,
            Preemption(),
            logger=self.curves,
            max_epochs=None,
            max_steps=NUM_STEPS,
            val_check_interval=VALIDATED,
            check_val_every_n_epoch=None,
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
        )
        self.code: Any = 0
        came: list[int] = []
        with handle_signals(lambda signum, _: came.append(signum), *preemption.SIGNALS):
            try:
                trainer.fit(self.method, datamodule=data, ckpt_path=self.saved, weights_only=False)
            except Stopped as stopped:
                self.code = stopped.code
            for signum in preemption.SIGNALS:
                signal.raise_signal(signum)
        assert came == [*preemption.SIGNALS], "earlier handlers are installed again"
        self.step = trainer.global_step

    @property
    def points(self) -> dict[int, dict[str, float]]:
        slow = ("seconds", "second", "logprob_gap", "epoch")
        return {s: {k: v for k, v in p.items() if not k.endswith(slow)} for s, p in self.curves.points.items()}


@pytest.fixture(scope="module")
def whole(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    fit = Fit(path, tmp_path_factory.mktemp("whole"))
    assert fit.code == 0 and fit.step == NUM_STEPS
    return fit


MOMENTS = {
    "the rollouts of the first step": (0, 1),
    "the rollouts of a step that a validation follows": (1, 2),
    "a validation, in its first call": (2, 2),
    "a validation, in its last call": (3, 2),
    "the rollouts of a step in the middle of an epoch": (CALLS_PER_ROUND, 3),
    "the validation of another epoch": (CALLS_PER_ROUND + 2, 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_goes_on_to_the_bit(path: Path, tmp_path: Path, whole: Fit, moment: str) -> None:
    call, step = MOMENTS[moment]
    signum = signal.SIGUSR1 if call % 2 else signal.SIGTERM
    first = Fit(path, tmp_path, {call: signum})
    assert (first.code, first.step) == (128 + signum, step)
    assert newest_checkpoint(tmp_path / "checkpoints") == tmp_path / f"checkpoints/preempted-step={step}.ckpt"
    second = Fit(path, tmp_path)
    assert same(weights_of(second.method), weights_of(whole.method))
    assert second.method.teacher_generation == whole.method.teacher_generation
    assert first.engine.num_calls + second.engine.num_calls == whole.engine.num_calls, "no call is made twice"
    seen: dict[int, dict[str, float]] = {}
    for fit in (first, second):
        for at, metrics in fit.points.items():
            assert not seen.get(at, {}).keys() & metrics.keys(), "logged once"
            seen.setdefault(at, {}).update(metrics)
    assert seen.keys() == whole.points.keys()
    for at, metrics in whole.points.items():
        assert seen[at] == pytest.approx(metrics, nan_ok=True), at


def test_after_the_last_step_the_run_ends_as_it_would(path: Path, tmp_path: Path, whole: Fit) -> None:
    """A signal in the rollouts of the last step, or in the last validation, saves, and is no reason to stop."""
    last = Fit(path, tmp_path / "a", {whole.engine.num_calls - 3: signal.SIGTERM})
    validating = Fit(path, tmp_path / "b", {whole.engine.num_calls - 1: signal.SIGTERM})
    for fit, root in ((last, tmp_path / "a"), (validating, tmp_path / "b")):
        assert fit.code == 0 and fit.points.keys() == whole.points.keys()
        assert all(fit.points[at] == pytest.approx(metrics, nan_ok=True) for at, metrics in whole.points.items())
        assert same(weights_of(fit.method), weights_of(whole.method))
        assert newest_checkpoint(root / "checkpoints") == root / f"checkpoints/preempted-step={NUM_STEPS}.ckpt"


def test_before_the_first_step_there_is_nothing_to_save(path: Path, tmp_path: Path) -> None:
    class SignalledFirst(Preemption):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            super().on_fit_start(trainer, pl_module)
            os.kill(os.getpid(), signal.SIGTERM)

    fit = Fit(path, tmp_path, {}, SignalledFirst())
    assert (fit.code, fit.step, fit.engine.num_calls) == (143, 0, 0)
    assert not (tmp_path / "checkpoints").exists()


def test_older_ones_go(path: Path, tmp_path: Path) -> None:
    steps = [Fit(path, tmp_path, {3: signal.SIGTERM}).step for _ in range(2)]
    assert steps[0] < steps[1]
    names = [file.name for file in (tmp_path / "checkpoints").glob("preempted*.ckpt")]
    assert names == [f"preempted-step={steps[1]}.ckpt"]
