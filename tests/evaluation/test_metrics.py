"""Metrics against definitions and slow references; partial sums add up."""

from __future__ import annotations

import copy
import itertools
import math
import random
import statistics
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric

from sdzero.evaluation.metrics import (
    AccuracyAtK,
    BenchmarkMetrics,
    CorrectionRate,
    LengthDistribution,
    Ratios,
    average_benchmarks,
)
from sdzero.types import Prompt, Question, Reason, Rollout, ScoredRollout, Verdict

rewards = st.integers(0, 1)


def floats(metric: Metric | BenchmarkMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


@given(st.lists(st.lists(rewards, min_size=3, max_size=8), min_size=2, max_size=12))
def test_accuracy(groups: list[list[int]]) -> None:
    means = [statistics.fmean(group) for group in groups]
    best = [statistics.fmean(map(max, itertools.combinations(group, 3))) for group in groups]
    for k, passed in ((1, means), (3, best)):
        metric = AccuracyAtK(k)
        metric.update(groups)
        expected = {"avg_at_k": statistics.fmean(means), "avg_at_k_se": standard_error(means)}
        expected |= {f"pass_at_{k}": statistics.fmean(passed), f"pass_at_{k}_se": standard_error(passed)}
        assert floats(metric) == pytest.approx(expected, abs=1e-7)


def test_too_few_responses_are_refused() -> None:
    for groups in ([[1, 1, 1], [0, 1]], [[0, 1]]):
        with pytest.raises(ValueError, match=r"pass@3 needs 3 .* got 2"):
            AccuracyAtK(3).update(groups)
    with pytest.raises(ValueError, match="pass@1 needs 1 .* got 0"):
        AccuracyAtK(1).update([[1], []])
    with pytest.raises(ValueError, match="at least 1"):
        AccuracyAtK(0)


def test_errors_of_a_single_question_are_undefined() -> None:
    accuracy, correction = AccuracyAtK(1), CorrectionRate()
    accuracy.update([[1, 0]])
    correction.update([0, 1], [1, 1], ["a", "a"])
    assert floats(accuracy)["avg_at_k"] == 0.5
    assert math.isnan(floats(accuracy)["avg_at_k_se"])
    assert math.isnan(floats(correction)["acc2_se"])


def test_a_rank_without_questions_measures_nan_and_adds_nothing() -> None:
    empty, some = AccuracyAtK(2), AccuracyAtK(2)
    empty.update([])
    some.update([[1, 0], [1, 1]])
    assert all(map(math.isnan, floats(empty).values()))
    before = floats(some)
    some.merge_state(empty)
    assert floats(some) == before
    nothing = CorrectionRate()
    nothing.update([], [])
    assert math.isnan(floats(nothing)["acc1"])


def test_metrics_of_a_benchmark_by_hand() -> None:
    prompt = Prompt(Question("q", "?", "1"), (1,))

    def response(text: str, num_tokens: int, reason: Reason) -> ScoredRollout:
        rollout = Rollout(prompt, (1,) * num_tokens, (0.0,) * num_tokens, text, "stop", 0)
        return ScoredRollout(rollout, Verdict(1, reason) if reason == "correct" else Verdict(0, reason))

    metrics = BenchmarkMetrics(2)
    metrics.update([[response("Wait, wait.", 10, "correct"), response("fine", 20, "truncated")]])
    metrics.update([[response("oops", 60, "correct"), response("", 10, "timeout")]])
    shares = dict.fromkeys(get_args(Reason), 0.0) | {"correct": 0.5, "truncated": 0.25, "timeout": 0.25}
    expected = {"avg_at_k": 0.5, "avg_at_k_se": 0.0, "pass_at_2": 1.0, "pass_at_2_se": 0.0, "response_tokens": 25.0}
    expected |= {"keywords_per_response": 0.75, "keywords_per_1k_tokens": 30.0, **shares}
    assert floats(metrics) == pytest.approx(expected)


def test_averaged_over_benchmarks_by_hand() -> None:
    one, two = AccuracyAtK(2), AccuracyAtK(2)
    one.update([[1, 1], [0, 0], [1, 1], [1, 1]])  # 0.75, error 0.25
    two.update([[1, 0], [0, 0]])  # 0.25, error 0.25; pass@2 0.5, error 0.5
    averages = {name: float(value) for name, value in average_benchmarks([one.compute(), two.compute()]).items()}
    expected = {"avg_at_k": 0.5, "avg_at_k_se": math.hypot(0.25, 0.25) / 2}
    assert averages == pytest.approx({**expected, "pass_at_2": 0.625, "pass_at_2_se": math.hypot(0.25, 0.5) / 2})


def test_correction_rate_by_hand() -> None:
    metric = CorrectionRate()
    metric.update([0, 0, 0, 1], [1, 1, 0, 0])
    metric.update([1, 0], [1, 0])
    expected = {"acc1": 2 / 6, "acc2": 3 / 6, "wrong_to_right": 2, "right_to_wrong": 1, "wrong_to_right_rate": 2 / 4}
    expected |= {"right_to_wrong_rate": 1 / 2, "correction_rate": (3 / 6 - 2 / 6) / (1 - 2 / 6)}
    assert {name: floats(metric)[name] for name in expected} == pytest.approx(expected)


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


def updates(rng: random.Random) -> list[tuple[Metric, Any]]:
    num = rng.randint(0, 6)
    first, second, lengths = ([rng.randint(0, top) for _ in range(num)] for top in (1, 1, 99))
    return [
        (AccuracyAtK(2), ([[rng.randint(0, 1) for _ in range(5)] for _ in range(num)],)),
        (Ratios("a", "b"), {"a": (rng.randint(0, 9), num), "b": (rng.random(), 0)}),
        (CorrectionRate(), (first, second)),
        (LengthDistribution(), (lengths, first)),
    ]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("seed", range(4))
def test_two_halves_reduce_to_the_whole(index: int, seed: int) -> None:
    """`merge_state` reduces by dist_reduce_fx, as a sync over ranks does."""
    rng = random.Random(seed)
    (left, one), (right, two) = updates(rng)[index], updates(rng)[index]
    whole = copy.deepcopy(left)
    for metric, part in ((left, one), (right, two), (whole, one), (whole, two)):
        metric.update(**part) if isinstance(part, dict) else metric.update(*part)
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


def test_ratios() -> None:
    ratios = Ratios("some", "none")
    ratios.update(some=(1, 2), none=(0, 0))
    ratios.update(some=(2, 2))
    assert ratios.compute()["some"] == 3 / 4 and ratios.compute()["none"].isnan()
