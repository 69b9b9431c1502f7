"""Every tracker works alone, with every method, and a resumed run leaves the curves and files of one that was not
interrupted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import sdzero.callbacks
from sdzero.callbacks import (
    CopyTracker,
    GenerateThenRevise,
    KeywordTracker,
    LengthTracker,
    SampleWriter,
    TokenKLRecorder,
)
from sdzero.data import Evaluation, RolloutDataModule, TraceDataModule
from sdzero.methods import SRT, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.tasks.base import TraceSource
from sdzero.types import Prompt, Sampling, Trace
from support.helpers import Curves, Notes, Toy, make_trace, make_trainer
from support.tiny_model import write_tiny_model

NUM_STEPS, RESUMED_AT = 4, 2
Points = dict[int, dict[str, float]]
READERS: dict[str, Callable[[], L.Callback]] = {
    "keywords": KeywordTracker,
    "lengths": LengthTracker,
    "copies": CopyTracker,
    "revisions": GenerateThenRevise,
    "samples": lambda: SampleWriter(every_n_steps=1),
    "token_kl": lambda: TokenKLRecorder(every_n_steps=1, num_responses=2),
}
NOT_READERS = {"ExportModel", "Preemption", "TeacherSync"}  # they act on the model, and have their own tests


def test_no_callback_is_forgotten() -> None:
    read = {type(make()).__name__ for make in READERS.values()}
    assert read | NOT_READERS == set(sdzero.callbacks.__all__)


class Demonstrations(TraceSource):
    def traces(self, builder: PromptBuilder) -> list[Trace]:
        return [make_trace(builder, f"q{i}", "1+1=3", f"1+1={i}", reward=i % 2) for i in range(NUM_STEPS)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1, hidden_size=32)


def say(prompt: Prompt, seed: int) -> str:
    wrong = f"1+2=4\n\nWait, this response is not correct, let me start over.\n\n1+2={seed % 7}"
    return f"1+1={prompt.question.answer}" if (seed + len(prompt.token_ids)) % 2 else wrong


def run(path: Path, root: Path, name: str, method: str, ckpt: Path | None = None) -> Points:
    """Logged values by step, without the method's own, seconds, and those of the engine's check."""
    sampling = Sampling(temperature=0.7, max_new_tokens=64)
    evaluation = Evaluation(num_questions=3, num_samples=2, num_revised=1, sampling=sampling, call_size=4)
    shared: dict[str, Any] = {"evaluation": evaluation, "max_logprob_gap": 99.0}
    engine, config = Notes(say), ModelConfig(str(path))
    if method == "srt":
        data: Any = TraceDataModule(Demonstrations(), 1, task=Toy(), engine=engine, **shared)
        module: Any = SRT(config)
    else:
        data = RolloutDataModule(Toy(), engine, 2 * NUM_STEPS, 2, sampling=sampling, **shared)
        module = SelfDistill(config)
    checkpoints = ModelCheckpoint(root / "ckpt", "{step}", save_top_k=-1, every_n_train_steps=1)
    curves = Curves()
    options = {"max_steps": NUM_STEPS, "enable_checkpointing": True, "val_check_interval": 1, "logger": curves}
    trainer = make_trainer(root, READERS[name](), checkpoints, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return {
        step: {name: value for name, value in values.items() if not re.match(r"train/|.*seconds|.*logprob_gap", name)}
        for step, values in curves.points.items()
    }


@pytest.mark.parametrize("method", ["srt", "self_distill"])
@pytest.mark.parametrize("name", READERS)
def test_alone_with_every_method_and_resumed(path: Path, tmp_path: Path, name: str, method: str) -> None:
    """The run up to the checkpoint is the interrupted one's, too."""
    whole = run(path, tmp_path / "whole", name, method)
    resumed = run(path, tmp_path / "resumed", name, method, tmp_path / f"whole/ckpt/step={RESUMED_AT}.ckpt")
    assert whole.keys() == set(range(NUM_STEPS)) and resumed.keys() == set(range(RESUMED_AT, NUM_STEPS))
    for step, values in resumed.items():
        assert values == pytest.approx(whole[step], nan_ok=True), step
    files, again = files_of(tmp_path / "whole"), files_of(tmp_path / "resumed")
    assert bool(files) == (name in ("samples", "token_kl"))
    assert again == {file: content for file, content in files.items() if is_of_resumed_part(file)}
    kinds = {file.split("-")[0] for file in files}
    assert not files or kinds == ({"eval"} if method == "srt" else {"train", "eval"})


def files_of(root: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for kind in ("samples", "token_kl") for file in (root / kind).rglob("*-rank0*")
    }


def is_of_resumed_part(file: str) -> bool:
    """Evaluations are numbered by the steps before them, training steps from 0."""
    kind, step, _ = file.split("-")
    return int(step) >= RESUMED_AT + (kind == "eval")
