"""Interrupted generate calls: what is kept of them, and that it biases no response."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.data.journal import CallJournal
from sdzero.engines.base import is_complete
from sdzero.prompts import PromptBuilder
from sdzero.utils.files import read_jsonl
from sdzero.utils.seeds import derive_seed
from support.sampled_calls import (
    CHANGES,
    END,
    SAMPLING,
    ByBatches,
    Killed,
    Stepping,
    calls,
    killed,
    partial,
    prompts,
    sample_changed,
    sampler,
)


def complete(builder: PromptBuilder, token_ids: Sequence[int]) -> bool:
    return is_complete(token_ids, builder.end_ids, SAMPLING.max_new_tokens)


def test_an_interrupted_call_resumes_from_its_tokens(
    builder: PromptBuilder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(builder, tmp_path, Stepping(3))
    kept = partial(tmp_path)
    num_kept = sum(map(len, kept.values()))
    running = [index for index in range(6) if not complete(builder, kept[index])]
    assert 0 < len(running) < 6 and all(len(kept[index]) == 3 for index in running)
    engine = Stepping()
    again = sampler(builder, tmp_path, 6, engine=engine)
    scored = again.sample(prompts(builder, 6), SAMPLING, "g", 0)
    ids = [f"phase1-{i}" for i in range(6)]
    assert [s.rollout.prompt.question.id for s in scored] == ids
    seed = derive_seed(derive_seed(7, "g", 0, 0), "rest", num_kept)
    assert engine.calls == [(seed, [ids[index] for index in running])]
    for index, one in enumerate(scored):
        ids, logprobs, sampled = one.rollout.token_ids, one.rollout.logprobs, kept[index]
        assert list(ids[: len(sampled)]) == sampled and (len(ids) > len(sampled)) == (index in running)
        assert logprobs == tuple(-token / 7 for token in ids)
        assert one.rollout.finish_reason == ("stop" if ids[-1] in builder.end_ids else "length")
    assert sum(len(s.rollout.token_ids) for s in scored) == num_kept + engine.num_sampled
    assert caplog.messages == [f"g, call 0: continues from {num_kept} tokens before an interruption"]
    assert again.journal.num_started == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["calls.log", "g.jsonl"]
    assert sampler(builder, tmp_path, 6, engine=Stepping(0)).sample(prompts(builder, 6), SAMPLING, "g", 0) == scored


@pytest.mark.parametrize("change", CHANGES)
def test_partial_responses_of_another_identity_are_ignored(builder: PromptBuilder, tmp_path: Path, change: str) -> None:
    killed(builder, tmp_path, Stepping(2))
    engine = type("Other", (Stepping,), {})() if change == "engine" else Stepping()
    scored = sample_changed(builder, tmp_path, change, engine)
    assert [len(ids) for _, ids in engine.calls] == [6]
    assert engine.num_sampled == sum(len(s.rollout.token_ids) for s in scored)
    left = ["g.partial"] if change == "group" else []  # that group may be sampled again
    assert [file.name for file in tmp_path.glob("*.partial")] == left and CallJournal(tmp_path).num_started == 2


@pytest.mark.parametrize(("kind", "options"), [(ByBatches, {}), (Stepping, {"keep_partial": False})])
def test_other_interrupted_calls_start_again(
    builder: PromptBuilder, tmp_path: Path, kind: type[Stepping], options: dict[str, Any]
) -> None:
    """Those of an engine that repeats bit for bit, and those of a training step."""
    killed(builder, tmp_path, kind(2), **options)
    assert [f.name for f in tmp_path.iterdir()] == ["calls.log"]
    again = sampler(builder, tmp_path, 6, engine=kind())
    again.sample(prompts(builder, 6), SAMPLING, "g", 0, **options)
    assert calls(again) == [(derive_seed(7, "g", 0, 0), [f"phase1-{i}" for i in range(6)])]
    assert again.journal.num_started == 2


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 400)), max_size=4), st.integers(1, 5))
def test_every_response_resumes_from_its_tokens_whatever_the_kills(
    builder: PromptBuilder, tmp_path_factory: pytest.TempPathFactory, kills: list[tuple[int, int]], call_size: int
) -> None:
    """Each kill comes after some steps, and may cut bytes off the file as a lost machine does."""
    folder = tmp_path_factory.mktemp("kills")
    for lives, num_cut in [*kills, (1000, 0)]:
        before = read_jsonl(folder / "g.jsonl") if (folder / "g.jsonl").exists() else []
        kept = partial(folder) if (folder / "g.partial").exists() else {}
        engine = Stepping(lives)
        one = sampler(builder, folder, call_size, engine=engine)
        try:
            scored = one.sample(prompts(builder), SAMPLING, "g", 0)
        except Killed:
            now = partial(folder)
        else:
            assert not (folder / "g.partial").exists()
            now = {}
        after = read_jsonl(folder / "g.jsonl") if (folder / "g.jsonl").exists() else []
        assert after[: len(before)] == before and [row["key"] for row in after] == [str(i) for i in range(len(after))]
        made = [[r["token_ids"] for r in row["responses"]] for row in after[len(before) :]]
        made.append([now.get(index, []) for index in range(max(now, default=-1) + 1)])
        for index, token_ids in kept.items():  # they belong to the first call that was not in the journal
            assert made[0][index][: len(token_ids)] == token_ids
            assert not complete(builder, token_ids) or made[0][index] == token_ids
        assert sum(len(ids) for row in made for ids in row) == sum(map(len, kept.values())) + engine.num_sampled
        if (file := folder / "g.partial").exists():
            file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - num_cut)])
    assert [s.rollout.prompt.question.id for s in scored] == [f"phase1-{i}" for i in range(5)]
    assert [list(s.rollout.token_ids) for s in scored] == [r["token_ids"] for row in after for r in row["responses"]]
    assert all(complete(builder, s.rollout.token_ids) for s in scored)


def lengths_of_killed_calls(builder: PromptBuilder, folder: Path, only_finished: bool) -> list[int]:
    """Lengths of 4,000 responses, by 40 a call that is killed after 3 steps and then made to its end.

    only_finished: of the killed call only the finished responses are left, and the others are sampled from their start.
    """
    lengths = []
    for seed in range(100):
        own, questions = folder / str(seed), prompts(builder, 40)
        with pytest.raises(Killed):
            sampler(builder, own, 40, seed=seed, engine=Stepping(3)).sample(questions, SAMPLING, "g", 0)
        if only_finished:
            kept = {index: ids for index, ids in partial(own).items() if complete(builder, ids)}
            header = (own / "g.partial").read_text().splitlines()[0]
            step = {index: (ids, [-token / 7 for token in ids]) for index, ids in kept.items()}
            (own / "g.partial").write_text(f"{header}\n{json.dumps(step)}\n")
        scored = sampler(builder, own, 40, seed=seed, engine=Stepping()).sample(questions, SAMPLING, "g", 0)
        lengths += [len(s.rollout.token_ids) for s in scored]
    return lengths


def chi_square(lengths: Sequence[int]) -> float:
    """Of lengths against those of calls that nobody kills: geometric, and cut at the limit. 7 degrees of freedom."""
    limit, counts = SAMPLING.max_new_tokens, Counter(lengths)
    shares = [END * (1 - END) ** (length - 1) for length in range(1, limit)] + [(1 - END) ** (limit - 1)]
    expected = [share * len(lengths) for share in shares]
    return sum((counts[length] - mean) ** 2 / mean for length, mean in enumerate(expected, 1))


def test_a_kill_changes_no_distribution(builder: PromptBuilder, tmp_path: Path) -> None:
    """By chance 26 is passed once in 2,000; keeping what was finished alone favours short responses beyond doubt."""
    assert chi_square(lengths_of_killed_calls(builder, tmp_path / "continued", only_finished=False)) < 26
    assert chi_square(lengths_of_killed_calls(builder, tmp_path / "resampled", only_finished=True)) > 500
