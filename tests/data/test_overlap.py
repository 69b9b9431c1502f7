"""Rollouts generated one step ahead: their weights, their time, and their use after a restart."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sdzero.data import Evaluation, RolloutDataModule
from sdzero.engines import TransformersEngine
from sdzero.engines.base import EngineDied, EngineError, SyncReport
from sdzero.engines.sync_check import fingerprint
from sdzero.methods import Method, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.types import Prompt, Rollout, Sampling
from sdzero.utils.seeds import derive_seed
from support.helpers import (
    Notes,
    RecordStudent,
    StaleEngine,
    Steps,
    Toy,
    fit,
    make_trainer,
    same,
    weights_of,
)

SAMPLING = Sampling(max_new_tokens=70)  # more than a probe's


class RemoteNotes(Notes):
    """Answers by the prompt, the seed and the weights it holds. Records each whole batch and its thread."""

    is_remote = True

    def __init__(self) -> None:
        super().__init__(self.answer)
        self.batches: list[tuple[int, dict[str, Tensor], bool]] = []  # version, weights, whether in the main thread
        self.num_running = 0
        self.closed = False

    def answer(self, prompt: Prompt, seed: int) -> str:
        return f"the answer is {derive_seed(prompt.question.id, seed, self.sum) % 4}"

    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        assert not self.num_running, "weights must not change during a call"
        super().sync(weights, policy_version)
        self.sum = sum(fingerprint(tensor) for tensor in self.weights.values())
        return SyncReport(0.0, str(self.sum))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *rest: Any, **more: Any) -> list[Rollout]:
        assert not self.num_running, "one call at a time"
        self.num_running += 1
        try:
            if len(prompts) == 4 and sampling == SAMPLING:  # neither a probe nor a validation
                self.begun(len(self.batches))
                version: int = rest[1]
                self.batches.append((version, self.weights, threading.current_thread() is threading.main_thread()))
            return super().generate(prompts, sampling, *rest, **more)
        finally:
            self.num_running -= 1

    def begun(self, index: int) -> None:
        """Do something before batch number `index` is answered."""

    def close(self) -> None:
        self.closed = True


class StopAfter(L.Callback):
    """Ends the fit after a step, once its checkpoint is written."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.num_steps


def no_prefetch_runs() -> bool:
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("sdzero-prefetch")]
    for thread in threads:
        thread.join(5)  # between the end of a call and of its thread
    return not any(thread.is_alive() for thread in threads)


def make(path: Path, engine: Any, **options: Any) -> tuple[Method, RolloutDataModule]:
    """Six questions, two a step, two responses each: three steps an epoch."""
    defaults: dict[str, Any] = {"max_logprob_gap": 99, "overlap": True, "rollouts_per_prompt": 2}
    data = RolloutDataModule(Toy(), engine, 6, 2, sampling=SAMPLING, **{**defaults, **options})
    return SelfDistill(ModelConfig(str(path)), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)), data


def test_an_engine_beside_the_trainer_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.overlap .* TransformersEngine uses the trainer"):
        make(path, TransformersEngine())


def test_a_step_trains_while_the_next_is_generated(path: Path, tmp_path: Path) -> None:
    """Each draw but the first waits until the step before it has begun: without overlap it would wait in vain. All
    steps but an epoch's first train on rollouts of the weights one step before."""
    student = RecordStudent()

    class Waits(RemoteNotes):
        def begun(self, index: int) -> None:
            if index % 3:
                assert student.started[index - 1].wait(60)

    engine = Waits()
    method, data = make(path, engine)
    steps = fit(method, data, tmp_path, student, max_epochs=2)
    assert student.versions == [(0, 0), (0, 1), (1, 2), (3, 3), (3, 4), (4, 5)]
    assert steps.curve("rollout/policy_lag") == [0, 1, 1, 0, 1, 1]
    assert [(version, in_main) for version, _, in_main in engine.batches] == [
        *((0, True), (0, False), (1, False)),
        *((3, True), (3, False), (4, False)),
    ]
    for (batch, _), (_, sampled_from, _) in zip(student.versions, engine.batches, strict=True):
        assert same(sampled_from, student.weights[batch])
    assert engine.closed and no_prefetch_runs()


@pytest.mark.parametrize("num_steps", [1, 4, 6])
def test_nothing_is_generated_after_the_last_step(path: Path, tmp_path: Path, num_steps: int) -> None:
    engine = RemoteNotes()
    method, data = make(path, engine)
    fit(method, data, tmp_path, max_steps=num_steps, max_epochs=2)
    assert len(engine.batches) == num_steps


def run(path: Path, root: Path, *callbacks: L.Callback, resume: bool = False) -> tuple[Method, Steps, RemoteNotes]:
    """Two epochs with validations in their middle, a checkpoint after every step."""
    engine, steps = RemoteNotes(), Steps()
    evaluation = Evaluation(num_questions=1, num_samples=1, sampling=SAMPLING)
    method, data = make(path, engine, evaluation=evaluation)
    checkpoints = ModelCheckpoint(root / "checkpoints", save_last=True, every_n_train_steps=1)
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 2, "enable_checkpointing": True}
    trainer = make_trainer(root, checkpoints, steps, *callbacks, **options)
    trainer.fit(method, datamodule=data, ckpt_path=root / "checkpoints/last.ckpt" if resume else None)
    return method, steps, engine


@pytest.fixture(scope="module")
def uninterrupted(path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Method, Steps]:
    method, steps, engine = run(path, tmp_path_factory.mktemp("whole"))
    assert steps.curve("rollout/policy_lag") == [0, 1, 1, 0, 1, 1] and len(engine.batches) == 6
    return method, steps


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_a_resumed_run_trains_on_prefetched_rollouts(
    path: Path, tmp_path: Path, uninterrupted: tuple[Method, Steps], num_steps: int
) -> None:
    """And ends as the one that was not stopped, to the bit. Nothing is drawn a second time."""
    _, _, before = run(path, tmp_path, StopAfter(num_steps))
    method, steps, after = run(path, tmp_path, resume=True)
    assert len(before.batches) + len(after.batches) == 6
    assert steps.curve("rollout/policy_lag") == [0, 1, 1, 0, 1, 1][num_steps:]
    for name in ("rollout/reward", "train/loss", "train/grad_norm"):
        assert steps.curve(name) == uninterrupted[1].curve(name)[num_steps:]
    assert same(weights_of(method), weights_of(uninterrupted[0]))


def test_a_validation_waits_for_the_prefetch(path: Path, tmp_path: Path) -> None:
    """It brings newer weights to the engine; the draw under way is to end with its own."""

    class Slow(RemoteNotes):
        def begun(self, index: int) -> None:
            time.sleep(1.5 if index == 1 else 0)

    engine, evaluation = Slow(), Evaluation(num_questions=1, num_samples=1, sampling=SAMPLING)
    method, data = make(path, engine, evaluation=evaluation)
    steps = fit(method, data, tmp_path, val_check_interval=1)
    assert steps.curve("rollout/policy_lag") == [0, 1, 1]
    assert [version for version, prompts in engine.calls if len(prompts) == 1] == [1, 2, 3]


def test_without_the_journal_the_batch_is_generated_again(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(path, tmp_path, StopAfter(1))
    shutil.rmtree(tmp_path / "journal")
    with caplog.at_level(logging.WARNING):
        _, steps, engine = run(path, tmp_path, resume=True)
    assert steps.curve("rollout/policy_lag") == [0, 1, 0, 1, 1] and len(engine.batches) == 5
    assert "batch 1 is sampled again with the current weights" in caplog.text


class Fails(RemoteNotes):
    """Raises in the draw of the third batch, once."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def begun(self, index: int) -> None:
        if index == 2 and self.error:
            error, self.error = self.error, None
            raise error


def test_an_error_in_the_thread_ends_the_run(path: Path, tmp_path: Path) -> None:
    student, engine = RecordStudent(), Fails(EngineError("the server holds other weights"))
    method, data = make(path, engine)
    with pytest.raises(EngineError, match="the server holds other weights"):
        fit(method, data, tmp_path, student)
    assert len(student.versions) == 2 and no_prefetch_runs()


def test_after_an_engine_failure_the_batch_is_generated_again(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Fails(EngineDied("the server is gone"))
    method, data = make(path, engine)
    steps = fit(method, data, tmp_path)
    assert steps.curve("rollout/policy_lag") == [0, 1, 0]
    assert "batch 2, generated in advance, is lost: the server is gone" in caplog.text


def test_an_error_of_the_trainer_leaves_no_thread(path: Path, tmp_path: Path) -> None:
    """The draw under way is taken back by closing the engine, which a server's client does."""
    gate = threading.Event()

    class Slow(RemoteNotes):
        def begun(self, index: int) -> None:
            assert index == 0 or gate.wait(60)

        def close(self) -> None:
            super().close()
            gate.set()

    class Breaks(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ArithmeticError("a callback's own")

    engine = Slow()
    method, data = make(path, engine)
    with pytest.raises(ArithmeticError, match="a callback's own"):
        fit(method, data, tmp_path, Breaks())
    assert engine.closed and no_prefetch_runs()


def test_stale_weights_are_found_before_their_rollouts_are_trained_on(path: Path, tmp_path: Path) -> None:
    """The comparison is made at the sync: when the rollouts are there, the trainer has other weights."""
    student, engine = RecordStudent(), StaleEngine()
    engine.is_remote = True  # pyright: ignore[reportAttributeAccessIssue]
    method, data = make(path, engine, max_logprob_gap=0.01)
    with pytest.raises(EngineError, match=r"policy version 1 the engine's log-probabilities are .* nats off"):
        fit(method, data, tmp_path, student)
    assert student.versions == [(0, 0)]
