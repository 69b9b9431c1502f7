"""However sequences share micro batches, loss and gradients are those of one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdzero.methods import SRT, Method, SelfDistill
from sdzero.models import language_model
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Question, TraceBatch
from support.helpers import Steps, fit, make_batch, make_scored, make_trace
from support.tiny_model import write_tiny, write_tiny_model

TEXTS = ("3", "the answer is 2", "Wait, let me start over: the answer is 4", "2 wait 2", "so it is 5")
PADDED, ALONE = {"max_tokens_per_micro_batch": 10_000}, {"max_tokens_per_micro_batch": 1}


@pytest.fixture(scope="module", params=["qwen3", "olmo3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Olmo 3 has layers that see no further than a window, here of 8 tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen3":
        return write_tiny_model(folder)
    kinds = ["sliding_attention", "full_attention"]
    return write_tiny(folder, "olmo3", sliding_window=8, layer_types=kinds, initializer_range=0.15)


def run(kind: type[Method], path: Path, root: Path, options: dict[str, Any]) -> Steps:
    builder = PromptBuilder.from_pretrained(path)
    if kind is SRT:
        traces = [make_trace(builder, f"q{i}", text, "1+1=2", reward=i % 2) for i, text in enumerate(TEXTS)]
        batch: Any = TraceBatch(traces, 0)
    else:
        question = Question("q", "1+1=", "2")
        batch = make_batch([make_scored(builder, question, text, reward=i % 2) for i, text in enumerate(TEXTS)])
    teacher = {} if kind is SRT else {"teacher": ModelConfig(str(path), weights="random")}
    method = kind(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **teacher, **options)
    return fit(method, [batch], root)


@pytest.mark.parametrize("kind", [SRT, SelfDistill])
def test_loss_and_gradients_are_those_of_one_sequence_at_a_time(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Method]
) -> None:
    alone = run(kind, path, tmp_path, ALONE)
    padded = run(kind, path, tmp_path, PADDED)
    monkeypatch.setattr(language_model, "PACKING", ("sdpa",))  # which finds the sequences too, by a mask of T x T
    packed = run(kind, path, tmp_path, PADDED)
    for other in (padded, packed):
        assert other.metrics[0]["train/loss"] == pytest.approx(alone.metrics[0]["train/loss"], rel=1e-5)
        assert other.gradients[0].keys() == alone.gradients[0].keys()
        for name, gradient in alone.gradients[0].items():
            torch.testing.assert_close(other.gradients[0][name], gradient, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("attention", "packs"), [("sdpa", False), ("flash_attention_2", True), ("flex_attention", True)]
)
def test_what_attention_packs(attention: str, packs: bool) -> None:
    assert ModelConfig("x", attn_implementation=attention).packs is packs
