"""D_revision and its statistics, against METHOD.md's rules written out plainly over the same scripted answers."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdzero.data.collect import Collect
from sdzero.engines import ScriptedEngine
from sdzero.engines.base import EngineError
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.tasks import Chains
from sdzero.types import Prompt, Rollout, Sampling
from support.runs import ROOT, num_calls, read_json, refusal, rows

TINY = ROOT / "configs/tiny_model"
LIMIT = 12
QUESTIONS = 23
P = {
    0: "\n\nWait, this response is not correct, let me start over.\n\n",
    1: "\n\nLet me rephrase the above solution.\n\n",
}


class Actor(ScriptedEngine):
    """Right, wrong, unparseable and endless answers, drawn from the call's seed; it may die in a call.

    `log` holds (prompt, text) of all answers it gave, in order.
    """

    def __init__(self, dies_in: int | None = None, right: float = 0.4) -> None:
        super().__init__(self._answer)
        self.dies_in, self.right = dies_in, right
        self.log: list[tuple[Prompt, str]] = []
        self.is_warm = False

    def warm_up(self) -> None:
        assert self.policy_version == 0, "the weights are there"
        self.is_warm = True

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, policy_version: int, *rest: Any, **more: Any
    ) -> list[Rollout]:
        assert self.is_warm
        self._rng = random.Random(seed)
        rollouts = super().generate(prompts, sampling, seed, policy_version, *rest, **more)
        if self.num_generate_calls == self.dies_in:
            raise EngineError("the engine died in the middle of a call")
        self.log += [(prompt, rollout.text) for prompt, rollout in zip(prompts, rollouts, strict=True)]
        return rollouts

    def _answer(self, prompt: Prompt, seed: int) -> str:
        right = f"1+1=2A{prompt.question.answer}"
        wrong = f"2*1=2A{(int(prompt.question.answer) + 1) % 10}"
        endless = "1+1=2" + "1" * (LIMIT - 7) + f"A{prompt.question.answer}111"  # cut where it reads as right
        others = [(wrong, 0.3), ("1+1=2", 0.15), (endless, 0.15)]
        choices = [(right, self.right), *others]
        return self._rng.choices([c for c, _ in choices], [w for _, w in choices])[0]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The tiny model's config and tokenizer, with a stand-in for its weights: they are hashed, nobody loads them."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("collect") / "model")
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    return ModelConfig(str(folder))


def collect(model: ModelConfig, out: Path, engine: ScriptedEngine | None = None, **options: Any) -> Actor:
    engine = engine or Actor()
    defaults: dict[str, Any] = {"num_questions": QUESTIONS, "num_traces": None, "call_size": 4}
    sampling = Sampling(temperature=0.7, max_new_tokens=LIMIT)
    Collect(model, Chains(), engine, out, **{**defaults, "sampling": sampling, **options}).run()
    assert isinstance(engine, Actor)
    return engine


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
                    kept.append(
                        {
                            "question": {
                                "id": question.id,
                                "text": question.text,
                                "answer": question.answer,
                                "meta": {},
                                "family": "",
                            },
                            "prompt_ids": list(first_prompts[question.id]),
                            "init_ids": body,
                            "bridge_ids": encode(P[r]),
                            "revised_ids": revised,
                            "reward": r,
                        }
                    )
    assert next(firsts, None) is None and next(seconds, None) is None, "nothing else was sampled"
    return kept, counts


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"branches": "incorrect"},
        {"verified_only": False},
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


def test_a_cut_revision_is_never_a_trace(model: ModelConfig, tmp_path: Path) -> None:
    """Not even unfiltered, and not even where what it holds reads as the right answer."""
    engine = collect(model, tmp_path, verified_only=False)
    end = PromptBuilder.from_pretrained(model.path).end_id
    cut = [text for _, text in engine.log if text[-2:-1] == "A" and len(text) == LIMIT]
    revised = [row["revised_ids"] for row in rows(tmp_path / "traces.jsonl")]
    assert cut and all(ids[-1] == end and len(ids) < LIMIT + 1 for ids in revised)
    assert all(end not in ids[:-1] for ids in revised)


# --- which traces are drawn -----------------------------------------------------------------------


def draw(monkeypatch: pytest.MonkeyPatch, seed: int, kept: list[tuple[int, int, int, int]], **rules: Any) -> set[Any]:
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    return Collect(ModelConfig("x"), Chains(), Actor(), Path("x"), **rules)._choose(kept)


@given(
    num_wrong=st.integers(0, 60),
    num_right=st.integers(0, 60),
    num=st.none() | st.integers(1, 80),
    share=st.none() | st.sampled_from([0.0, 0.07, 0.29, 1 / 3, 0.5, 0.57, 0.9, 1.0]),
    seed=st.integers(0, 5),
)
def test_the_draw_is_as_large_as_the_share_allows(
    num_wrong: int, num_right: int, num: int | None, share: float | None, seed: int
) -> None:
    kept = [(i // 7, i % 7, 0, int(i >= num_wrong)) for i in range(num_wrong + num_right)]
    with pytest.MonkeyPatch.context() as patch:
        drawn = draw(patch, seed, kept, num_traces=num, correct_share=share)
        assert drawn == draw(patch, seed, kept[::-1], num_traces=num, correct_share=share), "the order told"
    assert drawn <= {*kept}
    wanted = len(kept) if num is None else min(num, len(kept))
    if share is None:
        assert len(drawn) == wanted
        return
    right = sum(k[3] for k in drawn)
    assert abs(right - share * len(drawn)) <= 0.5 + 1e-9
    if len(drawn) < wanted:  # one more would need a trace that is not there
        more = len(drawn) + 1
        assert share * more > num_right - 1e-6 or (1 - share) * more > num_wrong - 1e-6


def test_the_draw_is_seeded_and_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [(0, i, 0, i % 2) for i in range(40)]
    draws = [draw(monkeypatch, seed, kept, num_traces=10) for seed in range(200)]
    assert draws[0] == draw(monkeypatch, 0, kept, num_traces=10) and len({frozenset(d) for d in draws}) == 200
    times = Counter(k for drawn in draws for k in drawn)
    assert len(times) == 40 and all(20 < n < 85 for n in times.values()), "a quarter of 200, each of the forty"


@pytest.mark.parametrize("share", [None, 0.25])
def test_drawn_traces_are_candidates_in_their_order(model: ModelConfig, tmp_path: Path, share: float | None) -> None:
    engine = collect(model, tmp_path, num_traces=8, correct_share=share)
    kept, _ = plainly(model, engine.log)
    drawn = rows(tmp_path / "traces.jsonl")
    candidates = iter(kept)
    assert len(drawn) == 8 < len(kept) and all(row in candidates for row in drawn)
    statistics = read_json(tmp_path / "statistics.json")
    assert statistics["candidate_traces"] == len(kept) and statistics["traces"] == 8
    assert (
        statistics["correct_share"] == sum(row["reward"] for row in drawn) / 8 == (share or statistics["correct_share"])
    )


def test_too_few_traces_are_said(model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_finished_collection_asks_nothing_again(model: ModelConfig, tmp_path: Path) -> None:
    collect(model, tmp_path)
    before = bytes_of(tmp_path)
    assert collect(model, tmp_path).num_generate_calls == 0
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("cut", [1, 2, 40, 400])
def test_a_half_written_last_line_is_repaired_and_said(
    model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    collect(model, tmp_path)
    before, journal = bytes_of(tmp_path), tmp_path / "journal/00001-revision.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    with caplog.at_level(logging.WARNING):
        assert collect(model, tmp_path).num_generate_calls == 1
    assert f"{journal}: dropped an incomplete last line" in caplog.text
    assert bytes_of(tmp_path) == before
    caplog.clear()
    assert collect(model, tmp_path).num_generate_calls == 0 and not caplog.text


def test_a_damaged_middle_line_is_an_error(model: ModelConfig, tmp_path: Path) -> None:
    collect(model, tmp_path)
    journal = tmp_path / "journal/00001-revision.jsonl"
    first, *others = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first[:50] + b"\x00" + first[51:] + b"".join(others))
    with pytest.raises(ValueError, match=r"00001-revision\.jsonl: line 1 is damaged .*: remove the file"):
        collect(model, tmp_path)
    journal.write_bytes(first + b"7\n" + b"".join(others))
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        collect(model, tmp_path)
    journal.unlink()
    assert collect(model, tmp_path).num_generate_calls == len(others) + 1


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"sampling": Sampling(1.0, 1.0, LIMIT)}, {"engine_dtype": "bfloat16"}, {"call_size": 3}],
    ids=str,
)
def test_calls_of_another_identity_are_made_anew(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    before = collect(model, tmp_path).num_generate_calls
    options = dict(change)
    monkeypatch.setenv("PL_GLOBAL_SEED", str(options.pop("seed", 0)))
    assert collect(model, tmp_path, **options).num_generate_calls >= before
    fresh = tmp_path / "fresh"
    collect(model, fresh, **options)
    assert bytes_of(tmp_path) == bytes_of(fresh)


def test_calls_of_other_weights_are_made_anew(model: ModelConfig, tmp_path: Path) -> None:
    before = collect(model, tmp_path / "out").num_generate_calls
    folder = shutil.copytree(model.path, tmp_path / "model")
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    assert collect(ModelConfig(str(folder)), tmp_path / "out").num_generate_calls == before


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_questions": 0}, "num_questions must be at least 1"),
        ({"num_revisions": 0}, "num_revisions must be at least 1"),
        ({"num_traces": 0}, "num_traces must be at least 1, or null"),
        ({"correct_share": 1.5}, r"correct_share must lie in \[0, 1\]"),
    ],
    ids=str,
)
def test_settings_without_sense(model: ModelConfig, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(model, tmp_path, **options)


def test_no_trace_left_is_an_error_with_the_counts(
    model: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {q.id: "1+1=2" for q in Chains().questions("phase1", 5)}
    engine = json.dumps({"class_path": "sdzero.engines.ScriptedEngine", "init_args": {"responses": answers}})
    arguments = [
        "--student.path",
        model.path,
        "--task",
        "sdzero.tasks.Chains",
        "--engine",
        engine,
        "--num_questions",
        "5",
    ]
    said = refusal(capsys, monkeypatch, "collect", *arguments, "--out", tmp_path, "--sampling.max_new_tokens", "9")
    assert "no trace was left: of 15 revisions 0 were verified as correct" in said and "statistics.json" in said
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
