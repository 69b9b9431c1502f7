"""Choice of D_revision among the traces that may be kept."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sdzero.data.trace_choice import choose_answers, choose_traces


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
    chosen = choose_traces(kept, num, share, random.Random(seed))
    assert chosen == choose_traces(kept[::-1], num, share, random.Random(seed)), "the order matters"
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


def test_the_choice_is_seeded_and_fair() -> None:
    kept = [(0, i, 0, i % 2) for i in range(40)]
    choices = [choose_traces(kept, 10, None, random.Random(seed)) for seed in range(200)]
    assert choices[0] == choose_traces(kept, 10, None, random.Random(0)) and len({*map(frozenset, choices)}) == 200
    times = Counter(k for chosen in choices for k in chosen)
    assert len(times) == 40 and all(20 < n < 85 for n in times.values()), "a quarter of 200, each of the forty"


@given(
    nums=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    num=st.none() | st.integers(1, 60),
    seed=st.integers(0, 9),
)
def test_no_question_has_a_second_answer_before_all_have_a_first(nums: list[int], num: int | None, seed: int) -> None:
    """`nums[q]` answers of question q may be kept, of four each; three questions are a chunk."""
    kept = [(q // 3, 4 * (q % 3) + i, 0, 1) for q, n in enumerate(nums) for i in range(n)]
    chosen = choose_answers(kept, num, 4, random.Random(seed))
    assert chosen <= {*kept} and len(chosen) == len(kept) if num is None else len(chosen) == min(num, len(kept))
    taken = Counter(3 * chunk + i // 4 for chunk, i, _, _ in chosen)
    for q, n in enumerate(nums):
        assert taken[q] == n or taken[q] >= max(taken.values(), default=0) - 1
