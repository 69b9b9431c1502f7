"""What is recorded at each token, held against plain float64 forward passes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sdzero.callbacks import TokenKLRecorder
from sdzero.data import Evaluation, EvaluationDataModule
from sdzero.evaluation.statistics import top_share
from sdzero.methods import Demonstration, Policy, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Question, Sampling, ScoredRollout
from support.helpers import (
    Curves,
    Notes,
    Toy,
    fit,
    make_batch,
    make_scored,
    make_trainer,
    plain_logprobs,
    plain_model,
    read_by_hand,
)
from support.tiny_model import write_tiny_model

TOP_K = 3


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("other"), seed=1, num_hidden_layers=1, hidden_size=32)


@pytest.fixture(scope="module")
def scored(builder: PromptBuilder) -> list[ScoredRollout]:
    """Of different lengths, so that micro batches come in another order than the responses."""
    texts = [("7", 1), ("the answer is 3", 0), ("Wait, wait, it is", 0), ("1+1=2", 1)]
    meta = {"solution": "one and one is 2"}
    return [make_scored(builder, Question(f"q{i}", f"{i}+1=", "2", meta), t, r) for i, (t, r) in enumerate(texts)]


def recorded(root: Path, kind: str, step: int = 0) -> list[dict[str, Any]]:
    return pd.read_parquet(root / f"token_kl/{kind}-{step:06d}-rank0.parquet").to_dict("records")


@torch.no_grad()
def check(
    builder: PromptBuilder, row: dict[str, Any], one: ScoredRollout, read: tuple[int, ...], student: Any, teacher: Any
) -> None:
    """Every column of a row, with `read` as what the teacher reads before y."""
    rollout, y = one.rollout, torch.tensor(one.rollout.token_ids)
    expected = (rollout.prompt.question.id, rollout.text, one.verdict.reward)
    assert (row["question"], row["response"], row["reward"]) == expected
    assert row["token_ids"].tolist() == y.tolist() and "".join(row["tokens"]) == f"{rollout.text}<|im_end|>"
    log_s = plain_logprobs(student, rollout.prompt.token_ids, rollout.token_ids)
    log_t = plain_logprobs(teacher, read, rollout.token_ids)
    kl = (log_s.exp() * (log_s - log_t)).sum(-1)
    of_y = [log.gather(1, y[:, None]).squeeze(1) for log in (log_s, log_t)]
    assert row["kl"] == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-5)
    assert row["token_kl_reward"] == pytest.approx((of_y[0] - of_y[1]).tolist(), rel=1e-3, abs=1e-4)
    assert row["student_logprob"] == pytest.approx(of_y[0].tolist(), abs=1e-4)
    assert row["teacher_logprob"] == pytest.approx(of_y[1].tolist(), abs=1e-4)
    for who, log in (("student", log_s), ("teacher", log_t)):
        top = log.topk(TOP_K)
        probs = np.stack(row[f"{who}_top_prob"].tolist())
        assert probs == pytest.approx(top.values.exp().numpy(), abs=1e-4)
        pieces = [[builder.tokenizer.decode([i]) for i in ids] for ids in top.indices.tolist()]
        assert [list(tokens) for tokens in row[f"{who}_top"]] == pieces


@pytest.mark.parametrize("max_tokens", [1, 150, 8192])
def test_against_plain_forward_passes(
    path: Path, other: Path, builder: PromptBuilder, scored: list[ScoredRollout], tmp_path: Path, max_tokens: int
) -> None:
    """Student and another teacher, in micro batches of one, of some and of all; before the step is taken."""
    method = SelfDistill(ModelConfig(str(path)), teacher=ModelConfig(str(other)), max_tokens_per_micro_batch=max_tokens)
    curves = Curves()
    fit(method, [make_batch(scored)], tmp_path, TokenKLRecorder(num_responses=3, top_k=TOP_K), logger=curves)
    rows = recorded(tmp_path, "train")
    assert len(rows) == 3 and {row["step"] for row in rows} == {0}
    student, teacher = plain_model(path), plain_model(other)
    for row, one in zip(rows, scored, strict=False):
        check(builder, row, one, read_by_hand(builder, one), student, teacher)
    for r in (0, 1):
        shares = [top_share(row["kl"].tolist()) for row in rows if row["reward"] == r]
        assert curves.points[0][f"teacher/kl_top10_share_r{r}"] == pytest.approx(sum(shares) / len(shares))


def test_the_teacher_reads_its_context(
    path: Path, builder: PromptBuilder, scored: list[ScoredRollout], tmp_path: Path
) -> None:
    method = SelfDistill(ModelConfig(str(path)), context=Demonstration("{question} {demonstration}"))
    fit(method, [make_batch(scored)], tmp_path, TokenKLRecorder(1, 9, TOP_K))
    model = plain_model(path)
    for row, one in zip(recorded(tmp_path, "train"), scored, strict=True):
        check(builder, row, one, builder.chat(f"{one.rollout.prompt.question.text} one and one is 2"), model, model)


def test_a_method_without_a_teacher_is_its_own_reviser(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    """Of an evaluation: the first answers to the first questions, over several generate calls."""
    evaluation = Evaluation(num_questions=5, num_samples=2, sampling=Sampling(max_new_tokens=12), call_size=4)
    engine = Notes(lambda prompt, seed: f"so {prompt.question.answer}" if prompt.question.id != "eval-1" else "no")
    data = EvaluationDataModule(Toy(), engine, evaluation, max_logprob_gap=99)
    trainer = make_trainer(tmp_path, TokenKLRecorder(num_responses=3, top_k=TOP_K))
    trainer.test(Policy(ModelConfig(str(path))), datamodule=data, verbose=False)
    rows = recorded(tmp_path, "eval")
    assert [(row["question"], row["reward"]) for row in rows] == [("eval-0", 1), ("eval-1", 0), ("eval-2", 1)]
    model, questions = plain_model(path), Toy().questions("eval", 5)
    for row, question in zip(rows, questions, strict=False):
        one = make_scored(builder, question, row["response"], row["reward"])
        check(builder, row, one, read_by_hand(builder, one), model, model)
    assert trainer.callback_metrics["eval/kl_top10_share_r0"] == pytest.approx(top_share(rows[1]["kl"].tolist()))


def test_every_nth_step_and_what_cannot_be_scored(
    builder: PromptBuilder, scored: list[ScoredRollout], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = max(len(read_by_hand(builder, one)) + len(one.rollout.token_ids) for one in scored)
    path = write_tiny_model(tmp_path / "short", max_position_embeddings=long - 1)
    batches = [make_batch(scored, version) for version in range(5)]
    with caplog.at_level(logging.WARNING):
        fit(SelfDistill(ModelConfig(str(path))), batches, tmp_path, TokenKLRecorder(2))
    files = sorted(file.name for file in (tmp_path / "token_kl").iterdir())
    assert files == [f"train-{step:06d}-rank0.parquet" for step in (0, 2, 4)]
    texts = [one.rollout.text for one in scored if one.rollout.text != "Wait, wait, it is"]
    assert [row["response"] for row in recorded(tmp_path, "train", 2)] == texts
    assert "left out 1 responses" in caplog.text
    with pytest.raises(ValueError, match="at least 1"):
        TokenKLRecorder(every_n_steps=0)


def test_recording_changes_nothing(path: Path, scored: list[ScoredRollout], tmp_path: Path) -> None:
    """The step that follows has the gradients that it would have had."""
    gradients = [
        fit(SelfDistill(ModelConfig(str(path))), [make_batch(scored)], tmp_path, *callbacks).gradients[0]
        for callbacks in ([], [TokenKLRecorder(1)])
    ]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
