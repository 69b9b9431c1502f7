"""D_revision and its statistics, against METHOD.md's rules written out plainly over the same scripted answers."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdzero.engines.base import EngineError
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.tasks import Chains
from sdzero.types import Prompt, Sampling
from support.runs import num_calls, read_json, refusal, rows
from support.scripted_collection import LIMIT, QUESTIONS, Actor, collect

P = {
    0: "\n\nWait, this response is not correct, let me start over.\n\n",
    1: "\n\nLet me rephrase the above solution.\n\n",
}


def plainly(
    model: ModelConfig,
    log: list[tuple[Prompt, str]],
    num_initial: int = 1,
    num_revisions: int = 3,
    branches: str = "both",
    verified_only: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, Counter[str]]]:
    """All rows of D_revision that may be kept, and counts by kind, from the answers in the order they were given.

    Every token here is one word of the tokenizer, so ids come from looking words up.
    """
    builder = PromptBuilder.from_pretrained(model.path)
    encode = builder.tokenizer.encode
    first_prompts = {q.id: builder.prompt(q).token_ids for q in Chains().questions("phase1", QUESTIONS)}
    firsts: Iterator[tuple[Prompt, str]] = iter([x for x in log if x[0].token_ids == first_prompts[x[0].question.id]])
    seconds: Iterator[tuple[Prompt, str]] = iter([x for x in log if x[0].token_ids != first_prompts[x[0].question.id]])
    counts: dict[str, Counter[str]] = defaultdict(Counter)

    def judge(kind: str, text: str, answer: str) -> tuple[bool, list[int]]:
        """True if it is right, and its ids, with the end-of-turn token if it finished."""
        body = encode(text)
        finished = len(body) < LIMIT
        ids = [*body, builder.end_id] if finished else body
        digit = text.rpartition("A")[2] if "A" in text else ""
        reason = "correct" if digit == answer else "wrong" if len(digit) == 1 else "unparseable"
        reason = reason if finished else "truncated"
        counts[kind].update({"generations": 1, "tokens": len(ids), reason: 1})
        return reason == "correct", ids

    kept = []
    for question in Chains().questions("phase1", QUESTIONS):
        for _ in range(num_initial):
            prompt, text = next(firsts)
            assert prompt.question == question
            right, init = judge("initial", text, question.answer)
            r = int(right)
            body = [i for i in init if i != builder.end_id]
            for _ in range(num_revisions):
                prompt, text = next(seconds)
                assert list(prompt.token_ids) == [*first_prompts[question.id], *body, *encode(P[r])]
                right, revised = judge(f"revision_r{r}", text, question.answer)
                finished = revised[-1] == builder.end_id
                if finished and (right or not verified_only) and (branches == "both" or r == 0):
                    row = {"question": asdict(question), "prompt_ids": list(first_prompts[question.id])}
                    row |= {"init_ids": body, "bridge_ids": encode(P[r]), "revised_ids": revised, "reward": r}
                    kept.append(row)
    assert next(firsts, None) is None and next(seconds, None) is None, "nothing else was sampled"
    return kept, counts


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"branches": "incorrect"},
        {"verified_only": False},  # a truncated revision is no trace even so
        {"num_initial": 3, "num_revisions": 2},
        {"num_revisions": 1, "branches": "incorrect", "verified_only": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("call_size", [4, 64])
def test_traces_and_statistics_are_the_plain_rules(
    model: ModelConfig, tmp_path: Path, rules: dict[str, Any], call_size: int
) -> None:
    engine = collect(model, tmp_path, call_size=call_size, **rules)
    kept, counts = plainly(model, engine.log, **rules)
    assert rows(tmp_path / "traces.jsonl") == kept and len(kept) > 3
    assert read_json(tmp_path / "questions.json") == [q.id for q in Chains().questions("phase1", QUESTIONS)]

    statistics = read_json(tmp_path / "statistics.json")
    for kind in ("initial", "revision_r0", "revision_r1"):
        count = counts[kind]
        expected: dict[str, Any] = {"generations": count.pop("generations")}
        expected["mean_tokens"] = count.pop("tokens") / expected["generations"]
        expected |= {f"rate_{reason}": n / expected["generations"] for reason, n in count.items()}
        assert statistics[kind] == pytest.approx(expected)
        assert len(count) >= 2, "the script must hold several kinds of answers"
    num = QUESTIONS * rules.get("num_initial", 1) * (1 + rules.get("num_revisions", 3))
    assert statistics["num_generations"] == num == len(engine.log)
    builder = PromptBuilder.from_pretrained(model.path)
    lengths = [min(len(builder.tokenizer.encode(text)) + 1, LIMIT) for _, text in engine.log]
    assert statistics["num_tokens_sampled"] == sum(lengths)
    assert statistics["engine_calls"] == engine.num_generate_calls == num_calls(tmp_path)
    assert statistics["traces"] == statistics["candidate_traces"] == len(kept)
    share = sum(row["reward"] for row in kept) / len(kept)
    assert statistics["correct_share"] == statistics["candidate_correct_share"] == pytest.approx(share)


# --- which traces are chosen -----------------------------------------------------------------------


@pytest.mark.parametrize("share", [None, 0.25])
def test_chosen_traces_are_candidates_in_their_order(model: ModelConfig, tmp_path: Path, share: float | None) -> None:
    engine = collect(model, tmp_path, num_traces=8, correct_share=share)
    kept, _ = plainly(model, engine.log)
    chosen = rows(tmp_path / "traces.jsonl")
    candidates = iter(kept)
    assert len(chosen) == 8 < len(kept) and all(row in candidates for row in chosen)
    statistics = read_json(tmp_path / "statistics.json")
    assert statistics["candidate_traces"] == len(kept) and statistics["traces"] == 8
    correct = statistics["correct_share"]
    assert correct == sum(row["reward"] for row in chosen) / 8 == (share or correct)


def test_too_few_traces_are_logged(model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collect(model, tmp_path, num_traces=500)
    kept = len(rows(tmp_path / "traces.jsonl"))
    assert f"num_traces: 500 requested, only {kept} available" in caplog.text


# --- interruptions --------------------------------------------------------------------------------


def bytes_of(out: Path) -> dict[str, bytes]:
    names = ("traces.jsonl", "questions.json")
    return {name: (out / name).read_bytes() for name in names}


def test_an_engine_that_dies_in_any_call_costs_that_call(model: ModelConfig, tmp_path: Path) -> None:
    few: dict[str, Any] = {"num_questions": 11}
    whole = collect(model, tmp_path / "whole", **few).num_generate_calls
    assert whole == 3 + 9
    for n in range(1, whole + 1):
        out = tmp_path / str(n)
        with pytest.raises(EngineError):
            collect(model, out, Actor(dies_in=n), **few)
        assert not (out / "traces.jsonl").exists()
        again = collect(model, out, **few)
        assert bytes_of(out) == bytes_of(tmp_path / "whole")
        assert again.num_generate_calls == whole - (n - 1), "only the call that was cut short is made again"
        statistics, expected = read_json(out / "statistics.json"), read_json(tmp_path / "whole/statistics.json")
        assert statistics == {**expected, "engine_calls": whole + 1}
        calls = (out / "journal/calls.log").read_text().splitlines()
        assert Counter(Counter(calls).values()) == {1: whole - 1, 2: 1}


def test_a_finished_collection_samples_nothing_again(model: ModelConfig, tmp_path: Path) -> None:
    collect(model, tmp_path)
    before = bytes_of(tmp_path)
    assert collect(model, tmp_path).num_generate_calls == 0
    assert bytes_of(tmp_path) == before


CHANGES = [{"seed": 1}, {"sampling": Sampling(1.0, 1.0, LIMIT)}, {"engine_dtype": "bfloat16"}, {"call_size": 3}]


@pytest.mark.parametrize("change", [*CHANGES, {"weights": torch.zeros(2)}], ids=lambda change: next(iter(change)))
def test_calls_of_another_identity_are_made_again(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    before = collect(model, tmp_path / "out").num_generate_calls
    options = dict(change)
    monkeypatch.setenv("PL_GLOBAL_SEED", str(options.pop("seed", 0)))
    folder = shutil.copytree(model.path, tmp_path / "model")
    save_file({"weight": options.pop("weights", torch.ones(2))}, folder / "model.safetensors")
    other = ModelConfig(str(folder))
    assert collect(other, tmp_path / "out", **options).num_generate_calls >= before
    collect(other, tmp_path / "fresh", **options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_questions": 0}, "num_questions must be at least 1"),
        ({"num_revisions": -1}, "num_revisions must be at least 0"),
        ({"num_traces": 0}, "num_traces must be at least 1, or null"),
        ({"correct_share": 1.5}, r"correct_share must lie in \[0, 1\]"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(model: ModelConfig, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(model, tmp_path, **options)


def test_no_trace_left_is_an_error_with_the_counts(
    model: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {q.id: "1+1=2" for q in Chains().questions("phase1", 5)}
    engine = json.dumps({"class_path": "sdzero.engines.ScriptedEngine", "init_args": {"responses": answers}})
    arguments = ["--student.path", model.path, "--task", "sdzero.tasks.Chains", "--engine", engine]
    arguments += ["--num_questions", "5"]
    message = refusal(capsys, monkeypatch, "collect", *arguments, "--out", tmp_path, "--sampling.max_new_tokens", "9")
    assert "no trace was left: of 15 revisions 0 were verified as correct" in message and "statistics.json" in message
    assert read_json(tmp_path / "statistics.json")["revision_r0"]["rate_unparseable"] == 1


def test_no_trace_of_the_wanted_branch_says_which(model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"69 could be kept \(0 with r=0, 69 with r=1; .*correct_share=0\.5"):
        collect(model, tmp_path, Actor(right=1e9), correct_share=0.5)


def test_lengths_that_cannot_fit_are_refused_before_the_engine_starts(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Actor, "start", lambda *_: pytest.fail("the engine was started"))
    longest, bridge = 1 + 2 * 8 + 2, 15  # digits and operators, = and <|assistant|>; P_0 in tokens
    fits = (1024 - longest - bridge) // 2
    with pytest.raises(ValueError, match=rf"sampling\.max_new_tokens={fits + 1}: .* the model has 1024 positions"):
        collect(model, tmp_path, sampling=Sampling(0.7, 1.0, fits + 1), num_questions=200)
