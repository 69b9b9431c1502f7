"""Closed forms, by hand and against every sample."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.evaluation.statistics import (
    average,
    mean_rewards,
    paired_differences,
    pass_at_k,
    top_share,
)

rewards = st.integers(0, 1)


@given(st.lists(rewards, min_size=1, max_size=8), st.data())
def test_pass_at_k_against_every_sample(group: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(group)))
    samples = [max(sample) for sample in itertools.combinations(group, k)]
    assert pass_at_k(len(group), sum(group), k) == pytest.approx(statistics.fmean(samples))


def test_paired_differences_by_benchmark() -> None:
    a = {"x/1": [1, 1], "x/2": [0, 1], "x/3": [1, 1], "y/1/z": [1]}
    b = {"y/1/z": [0], "x/1": [0, 1], "x/2": [1, 0, 1, 0], "x/3": [0]}
    differences = paired_differences(a, b)
    assert [*differences] == ["x", "y"]
    assert differences["x"] == pytest.approx((0.5, statistics.stdev([0.5, 0.0, 1.0]) / math.sqrt(3)))
    assert differences["y"][0] == 1 and math.isnan(differences["y"][1])
    with pytest.raises(ValueError, match="3 questions are only in here and 1 only in there"):
        paired_differences(a, {"x/1": [1], "z/1": [1]}, ("here", "there"))


def test_average_by_hand() -> None:
    assert average([(0.2, 0.03), (0.4, 0.04)]) == pytest.approx((0.3, 0.05 / 2))
    assert average([(0.7, 0.01)]) == pytest.approx((0.7, 0.01))
    assert math.isnan(average([(0.7, 0.01), (0.1, math.nan)])[1])


def test_mean_rewards() -> None:
    assert mean_rewards({"x/1": [1, 0], "y/x/1": [1], "x/2": [0]}) == {"x": {"x/1": 0.5, "x/2": 0}, "y": {"y/x/1": 1}}
    assert mean_rewards({"plain": [1, 1, 0, 1]}) == {"": {"plain": 0.75}}


def test_top_share() -> None:
    assert top_share([4.0, 1, 1, 1, 1, 1, 1, 0, 0, 0]) == pytest.approx(0.4)
    assert top_share([1.0] * 20) == pytest.approx(0.1)
    assert top_share([1.0, 3.0]) == pytest.approx(0.75)  # at least one token
    assert math.isnan(top_share([0.0, 0.0]))
