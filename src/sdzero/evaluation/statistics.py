"""Means with standard errors, pass@k and paired differences, in plain Python.

Standard errors are over questions; they are nan where a single question (or none) leaves them undefined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from sdzero.types import benchmark_of

Estimate = tuple[float, float]
"""A value and its standard error."""

Rewards = Mapping[str, Sequence[int]]
"""Question id -> rewards of its answers."""


def mean_and_error(values: Sequence[float]) -> Estimate:
    """Return the mean and its standard error (sample standard deviation / sqrt(n)); nan where undefined."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def mean_rewards(rewards: Rewards) -> dict[str, dict[str, float]]:
    """Return the mean reward of each question's answers, by benchmark and question id."""
    means: dict[str, dict[str, float]] = {}
    for question, answers in rewards.items():
        means.setdefault(benchmark_of(question), {})[question] = math.fsum(answers) / len(answers)
    return means


def paired_differences(
    a: Rewards, b: Rewards, names: tuple[str, str] = ("the first evaluation", "the second")
) -> dict[str, Estimate]:
    """Return the mean over questions of a - b by benchmark, with its standard error.

    Args:
        a: rewards of an evaluation.
        b: rewards of the evaluation to compare with.
        names: what an error message calls the two.

    Raises:
        ValueError: the two answered different questions.
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"{len(a.keys() - b.keys())} questions are only in {names[0]} and {len(b.keys() - a.keys())} only in "
            f"{names[1]}: evaluate both on the same questions"
        )
    others = mean_rewards(b)
    return {
        benchmark: mean_and_error([mean - others[benchmark][question] for question, mean in means.items()])
        for benchmark, means in mean_rewards(a).items()
    }


def average(estimates: Iterable[Estimate]) -> Estimate:
    """Return the plain mean of independent values (table 1's last column) and its error, sqrt(sum of se^2) / n."""
    values, errors = zip(*estimates, strict=True)
    return math.fsum(values) / len(values), math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return 1 - C(n-c, k) / C(n, k): the chance that k of n samples, taken without replacement, hold a correct one."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def top_share(values: Sequence[float], share: float = 0.1) -> float:
    """Return the part of the sum that the largest `share` of the values hold; at least one value counts."""
    ordered = sorted(values, reverse=True)
    return math.fsum(ordered[: max(1, round(share * len(ordered)))]) / (math.fsum(ordered) or math.nan)
