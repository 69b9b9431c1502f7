"""Verified answers as demonstrations (RFT): `num_revisions: 0`, against the rules over the same scripted answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from sdzero.data import TraceFile
from sdzero.methods import SFT
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.tasks import Chains
from sdzero.types import TraceBatch
from support.runs import read_json, rows
from support.scripted_collection import LIMIT, QUESTIONS, Actor, collect

NUM_ANSWERS = 4


@pytest.fixture
def rft(model: ModelConfig, tmp_path: Path) -> tuple[Path, Actor]:
    return tmp_path, collect(model, tmp_path, num_initial=NUM_ANSWERS, num_revisions=0)


def expected(model: ModelConfig, engine: Actor) -> dict[str, list[tuple[int, ...]]]:
    """Return the distinct right answers of each question, in the order in which they were sampled."""
    builder = PromptBuilder.from_pretrained(model.path)
    found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for prompt, text in engine.log:
        ids = tuple(builder.tokenizer.encode(text))
        is_right = len(ids) < LIMIT and text.endswith(f"A{prompt.question.answer}")
        if is_right and (*ids, builder.end_id) not in found[prompt.question.id]:
            found[prompt.question.id].append((*ids, builder.end_id))
    return {id: answers for id, answers in found.items() if answers}


def test_traces_are_the_distinct_right_answers(rft: tuple[Path, Actor], model: ModelConfig) -> None:
    out, engine = rft
    assert len(engine.log) == QUESTIONS * NUM_ANSWERS, "nothing is revised"
    by_question: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for row in rows(out / "traces.jsonl"):
        assert row["init_ids"] == row["bridge_ids"] == [] and row["reward"] is None
        by_question[row["question"]["id"]].append(tuple(row["revised_ids"]))
    assert by_question == expected(model, engine) and len(by_question) > 5
    statistics = read_json(out / "statistics.json")
    num_right = sum(text.endswith(f"A{p.question.answer}") and len(text) < LIMIT for p, text in engine.log)
    assert statistics["initial"]["rate_correct"] * QUESTIONS * NUM_ANSWERS == pytest.approx(num_right)
    assert statistics["duplicates"] == num_right - statistics["traces"] > 0
    assert statistics["num_generations"] == len(engine.log)
    assert statistics["num_tokens_sampled"] == sum(
        len(r["token_ids"])
        for file in (out / "journal").glob("*.jsonl")
        for row in rows(file)
        for r in row["responses"]
    )


@pytest.mark.parametrize("num_traces", [5, 14])
def test_each_solved_question_has_one_before_any_has_two(model: ModelConfig, tmp_path: Path, num_traces: int) -> None:
    """With answers of many wordings; which ones are taken depends on the seed."""
    engine = Actor(right=0.6, num_wordings=3)
    collect(model, tmp_path, engine, num_initial=NUM_ANSWERS, num_revisions=0, num_traces=num_traces)
    solved = expected(model, engine)
    taken = Counter(row["question"]["id"] for row in rows(tmp_path / "traces.jsonl"))
    assert sum(taken.values()) == num_traces and taken.keys() <= solved.keys()
    if num_traces <= len(solved):
        assert max(taken.values()) == 1
    else:
        least = {id: taken[id] for id in solved if taken[id] < max(taken.values()) - 1}
        assert all(taken[id] == len(solved[id]) for id in least), "only a question without more answers has fewer"


def test_unverified_answers_are_kept_on_request(model: ModelConfig, tmp_path: Path) -> None:
    engine = collect(model, tmp_path, num_revisions=0, verified_only=False)
    finished = [text for _, text in engine.log if len(text) < LIMIT]
    assert len(rows(tmp_path / "traces.jsonl")) == len(finished) > sum("A" in text for text in finished) / 2


def test_a_killed_collection_resumes_to_the_same_bytes(model: ModelConfig, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_initial": NUM_ANSWERS, "num_revisions": 0}
    collect(model, tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="the engine died"):
        collect(model, tmp_path / "killed", Actor(dies_in=3), **options)
    collect(model, tmp_path / "killed", **options)
    ours, theirs = ((tmp_path / name / "traces.jsonl").read_bytes() for name in ("killed", "whole"))
    assert ours == theirs


def test_sft_trains_on_the_answers_alone(rft: tuple[Path, Actor], model: ModelConfig) -> None:
    """One target per trace, the answer with its end-of-turn token, after the question's prompt."""
    builder = PromptBuilder.from_pretrained(model.path)
    traces = TraceFile(rft[0] / "traces.jsonl").traces(builder)
    examples = SFT(model).examples(TraceBatch(traces, 0))
    prompts = {q.id: builder.prompt(q).token_ids for q in Chains().questions("phase1", QUESTIONS)}
    assert all(e.context == prompts[e.id] and e.target[-1] == builder.end_id for e in examples)
    assert all(e.num_init == len(e.target) for e in examples), "no token is a revision"


def test_options_of_revisions_are_refused(model: ModelConfig, tmp_path: Path) -> None:
    of_revisions: list[dict[str, Any]] = [{"correct_share": 0.5}, {"branches": "incorrect"}]
    for options in of_revisions:
        with pytest.raises(ValueError, match="num_revisions=0 samples none"):
            collect(model, tmp_path, num_revisions=0, **options)
    with pytest.raises(ValueError, match="no trace was left: of 23 answers 0 were verified"):
        collect(model, tmp_path, Actor(right=0.0), num_revisions=0)
