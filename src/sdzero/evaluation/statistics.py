"""Means with their standard errors, in plain Python.

Standard errors are over questions; they are nan where a single question (or none) leaves them undefined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from sdzero.types import benchmark_of

Estimate = tuple[float, float]
"""A figure and its standard error."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation / sqrt(n)); nan where undefined."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[float, float]:
    """Mean of a - b over the questions of two runs, and its standard error.

    Args:
        a: mean reward by question id.
        b: the same for the run to compare with: the same questions.
    """
    assert a.keys() == b.keys()
    return mean_and_error([a[key] - b[key] for key in a])


def mean_rewards(rewards: Mapping[str, Sequence[int]]) -> dict[str, dict[str, float]]:
    """The mean reward of each question's answers, by benchmark and question id."""
    means: dict[str, dict[str, float]] = {}
    for question, answers in rewards.items():
        means.setdefault(benchmark_of(question), {})[question] = math.fsum(answers) / len(answers)
    return means


def paired_differences(a: Mapping[str, Sequence[int]], b: Mapping[str, Sequence[int]]) -> dict[str, Estimate]:
    """`paired_difference` of two runs by benchmark.

    Args:
        a: the rewards of its answers by question id.
        b: the same for the run to compare with.

    Raises:
        ValueError: the runs answered different questions.
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"{len(a.keys() - b.keys())} questions are only in the first of two runs and {len(b.keys() - a.keys())} "
            "only in the second: evaluate both on the same questions"
        )
    theirs = mean_rewards(b)
    return {benchmark: paired_difference(means, theirs[benchmark]) for benchmark, means in mean_rewards(a).items()}


def average(estimates: Iterable[Estimate]) -> Estimate:
    """The plain mean of independent figures (table 1's last column), its standard error sqrt(sum of se^2) / n."""
    values, errors = zip(*estimates, strict=True)
    return math.fsum(values) / len(values), math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of the n samples, drawn without replacement, hold a correct one."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def top_share(values: Sequence[float], share: float = 0.1) -> float:
    """What the largest values hold of the sum of all: of 10 tokens' KL with share 0.1, the largest one's part."""
    ordered = sorted(values, reverse=True)
    return math.fsum(ordered[: max(1, round(share * len(ordered)))]) / (math.fsum(ordered) or math.nan)
