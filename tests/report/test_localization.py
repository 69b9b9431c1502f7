"""Figure 4's curve against slow references, and its invariants for any lengths."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.report import localization

VALUES = st.lists(st.floats(0, 10, width=32), min_size=1, max_size=70)


def frame(*responses: tuple[int, list[float]]) -> pd.DataFrame:
    return pd.DataFrame([{"reward": reward, "kl": np.array(values)} for reward, values in responses])


@given(VALUES, st.integers(1, 25))
def test_buckets_are_equal_and_keep_the_total_whatever_the_length(values, num_buckets):
    means = localization.bucket_means(values, num_buckets)
    # a value that is cut into num_buckets equal pieces leaves no border within a piece
    pieces = np.repeat(values, num_buckets).reshape(num_buckets, len(values))
    np.testing.assert_allclose(means, pieces.mean(axis=1), atol=1e-6)
    assert means.sum() * len(values) / num_buckets == pytest.approx(sum(values), abs=1e-5)


def test_the_curve_sorts_each_response_for_itself_and_averages_over_responses():
    rng = np.random.default_rng(0)
    responses = [
        (reward, rng.exponential(size=20 * n).tolist()) for reward, n in ((0, 1), (0, 3), (0, 2), (1, 2), (1, 4))
    ]
    curve = localization.bucket_curve(frame(*responses))
    assert curve["reward"].tolist() == [0] * 20 + [1] * 20 and curve["bucket"].tolist() == [*range(1, 21)] * 2
    for reward in (0, 1):
        of_reward = [sorted(values, reverse=True) for r, values in responses if r == reward]
        for bucket in range(20):
            means = []
            for values in of_reward:
                size = len(values) // 20
                means.append(sum(values[bucket * size : (bucket + 1) * size]) / size)
            row = curve[(curve["reward"] == reward) & (curve["bucket"] == bucket + 1)].iloc[0]
            assert row["mean"] == pytest.approx(np.mean(means))
            assert row["se"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)))
            assert row["responses"] == len(of_reward)


def test_positions_stay_in_their_order():
    rising = frame((1, [0.0, 1.0, 2.0, 3.0]))
    assert localization.position_curve(rising, num_buckets=2)["mean"].tolist() == [0.5, 2.5]
    assert localization.bucket_curve(rising, num_buckets=2)["mean"].tolist() == [2.5, 0.5]


def test_a_single_response_has_no_error_and_a_reward_without_responses_no_rows():
    curve = localization.bucket_curve(frame((0, [1.0])))
    assert set(curve["reward"]) == {0} and all(map(math.isnan, curve["se"]))
    assert len(localization.bucket_curve(pd.DataFrame())) == len(localization.concentration(pd.DataFrame())) == 0


def test_concentration_counts_what_few_tokens_hold():
    even, one, none = [0.5] * 10, [0.0] * 9 + [3.0], [0.0] * 10
    table = localization.concentration(frame((0, even), (0, one), (1, none))).set_index("reward")
    assert table.loc[0, "kl"] == pytest.approx((0.5 + 0.3) / 2)
    assert table.loc[0, "top_share"] == pytest.approx((0.1 + 1.0) / 2)
    assert table.loc[0, "half"] == pytest.approx((0.5 + 0.1) / 2)
    assert table.loc[1, "kl"] == 0 and math.isnan(table.loc[1, "top_share"]) and table.loc[1, "responses"] == 1
