"""Choice of D_revision among the traces that may be kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.data.collect import Collect
from sdzero.engines import ScriptedEngine
from sdzero.models.language_model import ModelConfig
from sdzero.tasks import Chains


def choose(monkeypatch: pytest.MonkeyPatch, seed: int, kept: list[tuple[int, int, int, int]], **rules: Any) -> set[Any]:
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    return Collect(ModelConfig("x"), Chains(), ScriptedEngine({}), Path("x"), **rules)._choose(kept)


@given(
    num_wrong=st.integers(0, 60),
    num_right=st.integers(0, 60),
    num=st.none() | st.integers(1, 80),
    share=st.none() | st.sampled_from([0.0, 0.07, 0.29, 1 / 3, 0.5, 0.57, 0.9, 1.0]),
    seed=st.integers(0, 5),
)
def test_the_choice_is_as_large_as_the_share_allows(
    num_wrong: int, num_right: int, num: int | None, share: float | None, seed: int
) -> None:
    kept = [(i // 7, i % 7, 0, int(i >= num_wrong)) for i in range(num_wrong + num_right)]
    with pytest.MonkeyPatch.context() as patch:
        chosen = choose(patch, seed, kept, num_traces=num, correct_share=share)
        assert chosen == choose(patch, seed, kept[::-1], num_traces=num, correct_share=share), "the order matters"
    assert chosen <= {*kept}
    wanted = len(kept) if num is None else min(num, len(kept))
    if share is None:
        assert len(chosen) == wanted
        return
    right = sum(k[3] for k in chosen)
    assert abs(right - share * len(chosen)) <= 0.5 + 1e-9
    if len(chosen) < wanted:  # one more would need a trace that is not there
        more = len(chosen) + 1
        assert share * more > num_right - 1e-6 or (1 - share) * more > num_wrong - 1e-6


def test_the_choice_is_seeded_and_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [(0, i, 0, i % 2) for i in range(40)]
    choices = [choose(monkeypatch, seed, kept, num_traces=10) for seed in range(200)]
    assert choices[0] == choose(monkeypatch, 0, kept, num_traces=10) and len({*map(frozenset, choices)}) == 200
    times = Counter(k for chosen in choices for k in chosen)
    assert len(times) == 40 and all(20 < n < 85 for n in times.values()), "a quarter of 200, each of the forty"
