"""Generate calls: their identity, and ranks that share an engine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sdzero.data.sampler import score
from sdzero.engines.base import EngineDied, RolloutEngine
from sdzero.prompts import PromptBuilder
from sdzero.types import Question, Rollout
from sdzero.utils.files import read_jsonl
from sdzero.utils.seeds import derive_seed
from support.helpers import Toy
from support.sampled_calls import (
    CHANGES,
    SAMPLING,
    Seeds,
    Stepping,
    calls,
    killed,
    partial,
    prompts,
    sample_changed,
    sampler,
)


def test_calls_have_a_fixed_composition_and_a_seed_of_their_own(builder: PromptBuilder, tmp_path: Path) -> None:
    one = sampler(builder, tmp_path)
    scored = one.sample(prompts(builder), SAMPLING, "train-000003", 0)
    assert [s.rollout.prompt.question.id for s in scored] == [f"phase1-{i}" for i in range(5)]
    expected = [(0, ["phase1-0", "phase1-1"]), (1, ["phase1-2", "phase1-3"]), (2, ["phase1-4"])]
    assert calls(one) == [(derive_seed(7, "train-000003", call, 0), ids) for call, ids in expected]


def test_no_two_calls_share_a_seed(builder: PromptBuilder, tmp_path: Path) -> None:
    seeds = []
    for rank in (0, 1):
        for seed in (7, 8):
            one = sampler(builder, tmp_path / f"{rank}{seed}", rank=rank, seed=seed)
            for group in ("train-000000", "train-000001"):
                one.sample(prompts(builder), SAMPLING, group, 0)
            seeds += [call[0] for call in calls(one)]
    assert len(set(seeds)) == len(seeds) == 24


def test_finished_calls_are_read_back_unchanged(builder: PromptBuilder, tmp_path: Path) -> None:
    before = sampler(builder, tmp_path).sample(prompts(builder), SAMPLING, "g", 0)
    again = sampler(builder, tmp_path)
    assert again.sample(prompts(builder), SAMPLING, "g", 0) == before and not calls(again)
    assert again.journal.num_started == 3


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_of_another_identity_is_sampled_again(builder: PromptBuilder, tmp_path: Path, change: str) -> None:
    sampler(builder, tmp_path, 6).sample(prompts(builder, 6), SAMPLING, "g", 0)
    engine = type("Other", (Seeds,), {})() if change == "engine" else Seeds()
    sample_changed(builder, tmp_path, change, engine)
    assert len(engine.calls) == 1


def sample_on_two_ranks(builder: PromptBuilder, folder: Path, call_size: int, kind: Any = Seeds) -> list[Any]:
    """Sample five prompts on rank 0 and two on rank 1 in threads; return the engines.

    A rank that waits for the other in vain breaks the barrier.
    """
    barrier, values = threading.Barrier(2, timeout=10), [0, 0]

    def run(rank: int) -> RolloutEngine:
        def all_reduce_max(value: int) -> int:
            values[rank] = value
            barrier.wait()
            result = max(values)
            barrier.wait()
            return result

        own = PromptBuilder.from_pretrained(builder.tokenizer.name_or_path)  # tokenizers are not thread-safe
        one = sampler(own, folder / str(rank), call_size, rank, engine=kind())
        one.all_reduce_max = all_reduce_max
        assert len(one.sample(prompts(own, (5, 2)[rank]), SAMPLING, "g", 0)) == (5, 2)[rank]
        return one.engine

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (0, 1)))


def test_ranks_that_share_an_engine_make_every_call_together(builder: PromptBuilder, tmp_path: Path) -> None:
    """Also if one of them has two more calls in its journal after a kill."""

    def questions() -> list[list[list[str]]]:
        return [[ids for _, ids in engine.calls] for engine in sample_on_two_ranks(builder, tmp_path, 2)]

    ids = [f"phase1-{i}" for i in range(5)]
    assert questions() == [[ids[:2], ids[2:4], ids[4:]], [ids[:2], [], []]]
    assert questions() == [[], []]
    journal = tmp_path / "1/g.jsonl"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    assert questions() == [[ids[2:4], ids[4:]], [[], []]]


def test_ranks_that_share_an_engine_resume_a_call_together(builder: PromptBuilder, tmp_path: Path) -> None:
    """One was killed within the call, the other has finished it: both make it again, from new seeds."""
    killed(builder, tmp_path / "0", Stepping(2), 5)
    num_kept = sum(map(len, partial(tmp_path / "0").values()))
    scored = sampler(builder, tmp_path / "1", 5, 1, engine=Stepping()).sample(prompts(builder, 2), SAMPLING, "g", 0)
    num_whole = sum(len(s.rollout.token_ids) for s in scored)
    engines = sample_on_two_ranks(builder, tmp_path, 5, Stepping)
    [(seed, first)], [(other_seed, second)] = (engine.calls for engine in engines)
    assert 0 < len(first) <= 5 and second == []
    expected = [derive_seed(derive_seed(7, "g", 0, rank), "rest", max(num_kept, num_whole)) for rank in (0, 1)]
    assert [seed, other_seed] == expected
    for rank, num in ((0, 5), (1, 2)):
        assert [len(row["responses"]) for row in read_jsonl(tmp_path / f"{rank}/g.jsonl")][-1] == num
    again = sampler(builder, tmp_path / "1", 5, 1, engine=Stepping(0)).sample(prompts(builder, 2), SAMPLING, "g", 0)
    assert again == scored


def test_ranks_that_share_an_engine_fail_together(builder: PromptBuilder, tmp_path: Path) -> None:
    """One that has finished the call keeps it, and makes no other alone."""
    one = sampler(builder, tmp_path, 2, engine=Stepping())
    one.all_reduce_max = lambda value: 1 if one.engine.calls else max(value, 1)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(EngineDied, match="another rank that shares it"):
        one.sample(prompts(builder, 2), SAMPLING, "g", 0)
    assert [len(row["responses"]) for row in read_jsonl(tmp_path / "g.jsonl")] == [2]


def test_a_cut_response_is_truncated_whatever_it_contains(builder: PromptBuilder, tmp_path: Path) -> None:
    question = Question("q", "1+1=", "2")
    right = Rollout(builder.prompt(question), (), (), "=2", "stop", 0)
    assert score([right], Toy())[0].verdict.reason == "correct"
    cut = Rollout(builder.prompt(question), (), (), "=2", "length", 0)
    assert (score([cut], Toy())[0].verdict.reward, score([cut], Toy())[0].verdict.reason) == (0, "truncated")
