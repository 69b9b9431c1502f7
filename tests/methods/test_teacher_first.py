"""Teacher passes before the student's first: the same step in another order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from sdzero.losses import Divergence
from sdzero.losses.soft_targets import HiddenTargets, SoftTargets, TopKTargets
from sdzero.methods import SelfDistill
from sdzero.models.language_model import LanguageModel, ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Question
from support.helpers import Steps, fit, make_batch, make_scored, same

TEXTS = ("3", "the answer is 2", "Wait, it is 4")
TOP_K = Divergence(top_k=5)
DIVERGENCES = [Divergence(), TOP_K, replace(TOP_K, outside="tail"), replace(TOP_K, support="student")]


class Passes(L.Callback):
    """Order of the forward passes in training."""

    def __init__(self) -> None:
        self.order = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for letter, model in (("s", pl_module.student), ("t", pl_module.teacher)):
            assert isinstance(model, LanguageModel)
            model.register_forward_hook(lambda *_, letter=letter: self._note(letter))

    def _note(self, letter: str) -> None:
        self.order += letter


def run(path: Path, root: Path, **options: Any) -> tuple[SelfDistill, Steps, str]:
    builder, question, passes = PromptBuilder.from_pretrained(path), Question("q", "1+1=", "2"), Passes()
    batch = make_batch([make_scored(builder, question, text, reward=i % 2) for i, text in enumerate(TEXTS)])
    method = SelfDistill(
        ModelConfig(str(path)),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        teacher=ModelConfig(str(path), weights="random"),
        max_tokens_per_micro_batch=1,
        **options,
    )
    return method, fit(method, [batch], root, passes), passes.order


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.top_k}-{d.support}-{d.outside}")
@pytest.mark.parametrize("moves", [False, True])
def test_the_step_is_bitwise_the_same(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, divergence: Divergence, moves: bool
) -> None:
    plain = run(path, tmp_path, divergence=divergence)
    monkeypatch.setattr(SelfDistill, "_teacher_moves", moves)
    first = run(path, tmp_path, divergence=divergence, teacher_first=True)
    assert (plain[2], first[2]) == ("tststs", "tttsss")
    assert same(plain[1].gradients[0], first[1].gradients[0])
    for metrics in (plain[1].metrics[0], first[1].metrics[0]):
        metrics.pop("train/tokens_per_second")
    assert plain[1].metrics[0] == pytest.approx(first[1].metrics[0], rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.top_k}-{d.support}-{d.outside}")
def test_the_top_k_is_kept_where_it_is_exact_else_hidden_states(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, divergence: Divergence
) -> None:
    """A tail is known from its own sum, not from what the top_k leave of 1; the student's choice comes later."""
    seen: list[SoftTargets] = []
    precompute = SelfDistill.precompute

    def watched(self: SelfDistill, batches: Any) -> list[SoftTargets]:
        seen.extend(precompute(self, batches))
        return seen

    monkeypatch.setattr(SelfDistill, "precompute", watched)
    run(path, tmp_path, divergence=divergence, teacher_first=True)
    kind = TopKTargets if divergence == TOP_K else HiddenTargets
    assert [type(teacher) for teacher in seen] == [kind] * 3


def test_the_teacher_is_away_between_its_pass_and_the_next(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves on a CPU, so the moves are recorded instead."""
    moves: list[str] = []
    monkeypatch.setattr(SelfDistill, "_teacher_moves", True)
    to = LanguageModel.to
    monkeypatch.setattr(LanguageModel, "to", lambda self, device: moves.append(str(device)) or to(self, device))
    monkeypatch.setattr(SelfDistill, "device", property(lambda self: torch.device("cpu:0")))
    method, *_ = run(path, tmp_path, teacher_first=True)
    assert moves == ["cpu:0", "cpu"]
    method.update_teacher(0.5)  # student and teacher must meet on one device
    assert moves == ["cpu:0", "cpu", "cpu:0"]
    method.state_dict()
    assert moves[3:] == ["cpu:0"]
