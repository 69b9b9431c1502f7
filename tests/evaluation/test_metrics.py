"""Metrics against definitions and slow references; partial sums add up."""

from __future__ import annotations

import copy
import itertools
import math
import random
import statistics
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric

from sdzero.evaluation.metrics import (
    AvgAtK,
    CorrectionRate,
    KeywordRate,
    LengthDistribution,
    PassAtK,
    Ratio,
    ReasonShares,
    ResponseLength,
    average_benchmarks,
)
from sdzero.types import Reason

rewards = st.integers(0, 1)
groups_of = st.lists(st.lists(rewards, min_size=3, max_size=8), min_size=2, max_size=12)


def floats(metric: Metric) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


@given(groups_of)
def test_avg_at_k(groups: list[list[int]]) -> None:
    metric = AvgAtK()
    metric.update(groups)
    means = [statistics.fmean(group) for group in groups]
    assert floats(metric) == pytest.approx(
        {"avg_at_k": statistics.fmean(means), "avg_at_k_se": standard_error(means)}, abs=1e-7
    )


@given(groups_of)
def test_pass_at_1_is_avg_and_pass_at_3_has_its_error(groups: list[list[int]]) -> None:
    one, three, avg = PassAtK(1), PassAtK(3), AvgAtK()
    for metric in (one, three, avg):
        metric.update(groups)
    assert list(floats(one).values()) == pytest.approx(list(floats(avg).values()), abs=1e-7)
    values = [statistics.fmean(map(max, itertools.combinations(group, 3))) for group in groups]
    assert floats(three) == pytest.approx(
        {"pass_at_3": statistics.fmean(values), "pass_at_3_se": standard_error(values)}, abs=1e-7
    )


def test_too_few_responses_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pass@3 needs 3 .* got 2"):
        PassAtK(3).update([[1, 1, 1], [0, 1]])
    with pytest.raises(ValueError, match="without rewards"):
        AvgAtK().update([[1], []])
    with pytest.raises(ValueError, match="at least 1"):
        PassAtK(0)


def test_errors_of_a_single_question_are_undefined() -> None:
    avg, correction = AvgAtK(), CorrectionRate()
    avg.update([[1, 0]])
    correction.update([0, 1], [1, 1], ["a", "a"])
    assert floats(avg)["avg_at_k"] == 0.5
    assert math.isnan(floats(avg)["avg_at_k_se"])
    assert math.isnan(floats(correction)["acc2_se"])


def test_a_rank_without_questions_measures_nan_and_adds_nothing() -> None:
    empty, some = AvgAtK(), AvgAtK()
    empty.update([])
    some.update([[1, 0], [1, 1]])
    assert all(map(math.isnan, floats(empty).values()))
    before = floats(some)
    some.merge_state(empty)
    assert floats(some) == before
    nothing = CorrectionRate()
    nothing.update([], [])
    assert math.isnan(floats(nothing)["acc1"])


@pytest.mark.parametrize(
    ("metric", "updates", "expected"),
    [
        (ResponseLength(), [([10, 20],), ([60],)], {"response_tokens": 30.0}),
        (
            ReasonShares(),
            [(["correct", "truncated", "correct"],), (["timeout"],)],
            dict.fromkeys(get_args(Reason), 0.0) | {"correct": 0.5, "truncated": 0.25, "timeout": 0.25},
        ),
        (
            KeywordRate(),
            [(["Wait, wait.", "fine"], [30, 20]), (["oops"], [50])],
            {"keywords_per_response": 1.0, "keywords_per_1k_tokens": 30.0},
        ),
    ],
    ids=["length", "reasons", "keywords"],
)
def test_two_updates_by_hand(metric: Metric, updates: list[tuple], expected: dict[str, float]) -> None:
    for update in updates:
        metric.update(*update)
    assert floats(metric) == pytest.approx(expected)


def test_averaged_over_benchmarks_by_hand() -> None:
    one, two = AvgAtK(), AvgAtK()
    one.update([[1, 1], [0, 0], [1, 1], [1, 1]])  # 0.75, error 0.25
    two.update([[1, 0], [0, 0]])  # 0.25, error 0.25
    averages = {name: float(value) for name, value in average_benchmarks([one.compute(), two.compute()]).items()}
    assert averages == pytest.approx({"avg_at_k": 0.5, "avg_at_k_se": math.sqrt(0.25**2 + 0.25**2) / 2})


def test_correction_rate_by_hand() -> None:
    metric = CorrectionRate()
    metric.update([0, 0, 0, 1], [1, 1, 0, 0])
    metric.update([1, 0], [1, 0])
    values = floats(metric)
    assert values["acc1"] == pytest.approx(2 / 6)
    assert values["acc2"] == pytest.approx(3 / 6)
    assert (values["wrong_to_right"], values["right_to_wrong"]) == (2, 1)
    assert values["wrong_to_right_rate"] == pytest.approx(2 / 4)
    assert values["right_to_wrong_rate"] == pytest.approx(1 / 2)
    assert values["correction_rate"] == pytest.approx((3 / 6 - 2 / 6) / (1 - 2 / 6))


def test_correction_rates_without_a_denominator() -> None:
    right, wrong = CorrectionRate(), CorrectionRate()
    right.update([1, 1], [1, 0])
    wrong.update([0, 0], [1, 0])
    assert (floats(right)["correction_rate"], floats(right)["wrong_to_right_rate"]) == (0, 0)
    assert floats(right)["right_to_wrong_rate"] == 0.5
    assert floats(wrong)["right_to_wrong_rate"] == 0
    assert math.isnan(floats(right)["correction_rate_se"])


@given(st.lists(st.lists(st.tuples(rewards, rewards), min_size=1, max_size=4), min_size=2, max_size=8))
def test_errors_of_correction_against_the_definition(questions: list[list[tuple[int, int]]]) -> None:
    """Ratio estimator: sum over questions of (u - R v)^2, times C / (C - 1), under the square root, over sum of v."""
    metric = CorrectionRate()
    flat = [(str(i), first, second) for i, pairs in enumerate(questions) for first, second in pairs]
    metric.update([row[1] for row in flat], [row[2] for row in flat], [row[0] for row in flat])
    values = floats(metric)

    def error(u: list[float], v: list[float]) -> float:
        ratio = sum(u) / sum(v)
        squares = sum((a - ratio * b) ** 2 for a, b in zip(u, v, strict=True))
        return math.sqrt(squares * len(u) / (len(u) - 1)) / sum(v)

    size = [float(len(pairs)) for pairs in questions]
    first = [float(sum(a for a, _ in pairs)) for pairs in questions]
    gain = [float(sum(b - a for a, b in pairs)) for pairs in questions]
    wrong = [a - b for a, b in zip(size, first, strict=True)]
    assert values["acc1_se"] == pytest.approx(error(first, size), abs=1e-6)
    if sum(wrong):
        assert values["correction_rate"] == pytest.approx(sum(gain) / sum(wrong))
        assert values["correction_rate_se"] == pytest.approx(error(gain, wrong), abs=1e-6)


def updates(rng: random.Random) -> list[tuple[Metric, tuple]]:
    groups = [[rng.randint(0, 1) for _ in range(5)] for _ in range(rng.randint(0, 6))]
    first, second = ([rng.randint(0, 1) for _ in groups] for _ in range(2))
    lengths = [rng.randint(1, 99) for _ in groups]
    texts = [rng.choice(["wait", "so", "oops, wait a minute"]) for _ in groups]
    return [
        (AvgAtK(), (groups,)),
        (PassAtK(2), (groups,)),
        (ResponseLength(), (lengths,)),
        (ReasonShares(), (rng.choices(get_args(Reason), k=len(groups)),)),
        (KeywordRate(), (texts, lengths)),
        (CorrectionRate(), (first, second)),
    ]


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("seed", range(4))
def test_two_halves_reduce_to_the_whole(index: int, seed: int) -> None:
    """`merge_state` reduces by dist_reduce_fx, as a sync over ranks does."""
    rng = random.Random(seed)
    (left, one), (right, two) = updates(rng)[index], updates(rng)[index]
    whole = copy.deepcopy(left)
    left.update(*one)
    right.update(*two)
    whole.update(*one)
    whole.update(*two)
    left.merge_state(right)
    assert floats(left) == pytest.approx(floats(whole), rel=1e-12, nan_ok=True)


@given(st.lists(st.tuples(st.integers(0, 40), rewards), min_size=1, max_size=30), st.integers(0, 30))
def test_lengths_against_the_sorted_list(responses: list[tuple[int, int]], cut: int) -> None:
    """In two updates, one of them perhaps empty."""
    metric = LengthDistribution()
    for part in (responses[:cut], responses[cut:]):
        metric.update([n for n, _ in part], [r for _, r in part])
    ordered = sorted(n for n, _ in responses)
    values = floats(metric)
    for name, share in (("length_p50", 0.5), ("length_p90", 0.9), ("length_max", 1.0)):
        assert values[name] == min(n for n in ordered if sum(m <= n for m in ordered) >= share * len(ordered))
    for reward in (0, 1):
        of_reward = [n for n, r in responses if r == reward]
        expected = statistics.fmean(of_reward) if of_reward else math.nan
        assert values[f"length_r{reward}"] == pytest.approx(expected, nan_ok=True)


def test_longest_lengths_share_a_place() -> None:
    metric = LengthDistribution()
    metric.update([metric.MAX_LENGTH + 5, 3], [1, 1])
    assert floats(metric)["length_max"] == metric.MAX_LENGTH


def test_ratio() -> None:
    ratio = Ratio()
    ratio.update(1, 2)
    ratio.update(2, 2)
    assert ratio.compute() == 3 / 4
    empty = Ratio()
    empty.update(0, 0)
    assert empty.compute().isnan()
