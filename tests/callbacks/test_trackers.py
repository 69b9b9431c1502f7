"""Keywords, lengths and copies of known responses, counted by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.callbacks import CopyTracker, KeywordTracker, LengthTracker
from sdzero.callbacks.copy_tracker import num_copied
from sdzero.data import Evaluation, EvaluationDataModule
from sdzero.methods import Policy, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Sampling, ScoredRollout
from support.helpers import Notes, Toy, fit, make_batch, make_scored, make_trainer
from support.tiny_model import SPECIAL, tiny_tokenizer, write_tiny_model

P0 = "Wait, this response is not correct, let me start over."
P1 = "Let me rephrase the above solution."
# reward, response; the tokenizer takes a listed word as one token, any other character as one
RESPONSES = [
    (1, "1+1=2"),  # 5 tokens and the end
    (0, f"1+2=4\n\n{P0}\n\n1+2=3, 3"),  # "Wait" and "let me start over" are keywords; 1+2= is copied
    (0, "oops"),
    (1, f"ab\n\n{P1}\n\nabcdef"),  # nothing: the attempt before has no run of four
]


def scored(builder: PromptBuilder) -> list[ScoredRollout]:
    return [make_scored(builder, Question(f"q{i}", f"{i}=", "0"), text, r) for i, (r, text) in enumerate(RESPONSES)]


def step(path: Path, batch: list[ScoredRollout], tracker: Any, root: Path) -> dict[str, float]:
    """What a training step of SelfDistill logs under rollout/, with that one tracker."""
    steps = fit(SelfDistill(ModelConfig(str(path))), [make_batch(batch)], root, tracker)
    return {k.removeprefix("rollout/"): v for k, v in steps.metrics[0].items() if k.startswith("rollout/")}


def test_keywords(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    batch = scored(builder)
    metrics = step(path, batch, KeywordTracker(), tmp_path)
    assert metrics["keywords_per_response"] == pytest.approx(3 / 4)
    assert metrics["keywords_per_1k_tokens"] == pytest.approx(3000 / sum(len(s.rollout.token_ids) for s in batch))
    assert metrics["keywords_share"] == pytest.approx(2 / 4)
    assert metrics["keywords_r0"] == pytest.approx(3 / 2) and metrics["keywords_r1"] == 0


def test_lengths(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    batch = scored(builder)
    lengths = [len(s.rollout.token_ids) for s in batch]
    metrics = step(path, batch, LengthTracker(), tmp_path)
    assert lengths[0] == 6 and lengths[2] == 5
    assert metrics["length_r1"] == pytest.approx((lengths[0] + lengths[3]) / 2)
    assert metrics["length_r0"] == pytest.approx((lengths[1] + lengths[2]) / 2)
    assert (metrics["length_p50"], metrics["length_p90"]) == (sorted(lengths)[1], max(lengths))
    assert metrics["length_max"] == max(lengths)
    assert "length_think" not in metrics  # its tokenizer has no such token


def test_thought_is_counted_apart(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model", vocab_size=len(tiny_tokenizer()) + 1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:2], "</think>"]})
    tokenizer.save_pretrained(path)
    builder = PromptBuilder.from_pretrained(path)
    batch = [make_scored(builder, Question(f"q{i}", "x", "1"), t, 1) for i, t in enumerate(["ab</think>1", "1"])]
    assert step(path, batch, LengthTracker(), tmp_path)["length_think"] == pytest.approx(3 / 2)


def test_copies_and_leaks(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    metrics = step(path, scored(builder), CopyTracker(), tmp_path)
    assert [metrics[f"phrase_leak{p}"] for p in ("", "_p0", "_p1")] == pytest.approx([2 / 4, 1 / 4, 1 / 4])
    second, fourth = len("1+2=3, 3"), len("abcdef")  # a character a token; "1+2=" is the common run
    assert metrics["copy_rate"] == pytest.approx(4 / (second + fourth))
    assert not [name for name in metrics if name.startswith("revise")]


def test_a_rate_without_anything_to_count_is_nan(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    right = [s for s in scored(builder) if s.verdict.reward][:1]
    trackers = {"keywords_r0": KeywordTracker(), "copy_rate": CopyTracker(), "length_r0": LengthTracker()}
    for name, tracker in trackers.items():
        assert math.isnan(step(path, right, tracker, tmp_path)[name])


def test_evaluations_count_what_is_copied_from_a_first_attempt(
    path: Path, builder: PromptBuilder, tmp_path: Path
) -> None:
    """Two questions, the first answered right; both revisions begin like their attempt."""

    def respond(prompt: Prompt, seed: int) -> str:
        revises = prompt.token_ids != builder.prompt(prompt.question).token_ids
        first = "0+1=1" if prompt.question.id == "eval-0" else "1+1=3"
        return first + " so" if revises else first

    settings = Evaluation(num_questions=2, num_samples=2, num_revised=1, sampling=Sampling(max_new_tokens=20))
    data = EvaluationDataModule(Toy(), Notes(respond), settings, max_logprob_gap=99)
    for trackers in ([CopyTracker()], [KeywordTracker(), LengthTracker(), CopyTracker()]):
        trainer = make_trainer(tmp_path, *trackers)
        for _ in range(2):  # nothing is left from the evaluation before
            trainer.test(Policy(ModelConfig(str(path))), datamodule=data, verbose=False)
            logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
            assert logged["eval/phrase_leak"] == 0 and "eval/copy_rate" not in logged
            for which in ("", "_r0", "_r1"):
                assert logged[f"eval/revise_copy_rate{which}"] == pytest.approx(5 / 8)
    assert logged["eval/keywords_share"] == 0 and logged["eval/length_max"] == 6
    assert "eval/keywords_per_response" in logged  # the method's own


@given(st.lists(st.integers(0, 2), max_size=14), st.lists(st.integers(0, 2), max_size=14), st.integers(1, 5))
def test_copied_tokens_by_search(revision: list[int], attempt: list[int], run: int) -> None:
    """A token counts if any run through it, however long from `run` up, stands in the attempt too."""
    size = max(1, min(run, len(revision)))

    def stands_in(part: list[int]) -> bool:
        return any(attempt[i : i + len(part)] == part for i in range(len(attempt)))

    copied = [
        any(
            stands_in(revision[begin:end])
            for begin in range(i + 1)
            for end in range(max(i + 1, begin + size), len(revision) + 1)
        )
        for i in range(len(revision))
    ]
    assert num_copied(revision, attempt, run) == sum(copied)
