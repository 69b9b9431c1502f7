"""Evaluation metrics as torchmetrics classes. Every state is a sum, so that ranks and partial results add up exactly.

Standard errors are over questions; they are nan where a single question (or none) leaves them undefined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchmetrics import Metric

from sdzero.evaluation.keywords import count_keywords
from sdzero.evaluation.statistics import average, pass_at_k
from sdzero.types import Reason, ScoredRollout

Scalars = dict[str, Tensor]


def average_benchmarks(metrics: Sequence[Scalars]) -> Scalars:
    """Average each metric over benchmarks, and its standard error `NAME_se` where it has one.

    Args:
        metrics: the same names for each benchmark.
    """
    averages: Scalars = {}
    for name in (name for name in metrics[0] if not name.endswith("_se")):
        error = f"{name}_se"
        value, value_se = average((m[name].item(), m[error].item() if error in m else math.nan) for m in metrics)
        averages[name] = metrics[0][name].new_tensor(value)
        if error in metrics[0]:
            averages[error] = metrics[0][name].new_tensor(value_se)
    return averages


class AccuracyAtK(Metric):
    """avg@k, the mean reward of a question's responses, and the unbiased pass@k, 1 - C(n-c, k) / C(n, k), as means over
    questions.

    `compute` returns `avg_at_k` and `pass_at_{k}`, each with its `_se`.

    Args:
        k: number of attempts; every question needs at least as many responses.
    """

    full_state_update = False
    count: Tensor  # number of questions
    totals: Tensor  # [2], sums of both values over questions
    squares: Tensor  # [2], sums of their squares

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for state in ("totals", "squares"):
            self.add_state(state, torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, groups: Sequence[Sequence[int]]) -> None:
        """Add one list of rewards per question."""
        fewest = min(map(len, groups), default=self.k)
        if fewest < self.k:
            raise ValueError(
                f"pass@{self.k} needs {self.k} responses per question, got {fewest}: sample more or lower k"
            )
        averages = [sum(group) / len(group) for group in groups]
        passed = [pass_at_k(len(group), sum(group), self.k) for group in groups]
        self.count += len(groups)
        for i, values in enumerate((averages, passed)):
            self.totals[i] += math.fsum(values)
            self.squares[i] += math.fsum(value * value for value in values)

    def compute(self) -> Scalars:
        means = self.totals / self.count
        variances = (self.squares - self.totals * means).clamp(min=0) / (self.count - 1)
        errors = torch.where(self.count > 1, (variances / self.count).sqrt(), torch.nan)
        scalars: Scalars = {}
        for i, name in enumerate(("avg_at_k", f"pass_at_{self.k}")):
            scalars[name], scalars[f"{name}_se"] = means[i], errors[i]
        return scalars


class Ratios(Metric):
    """Quotients of two sums, by name; nan where nothing was counted.

    Args:
        names: their names.
    """

    full_state_update = False
    sums: Tensor  # [names, 2], numerators and denominators

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.add_state("sums", torch.zeros(len(names), 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **parts: tuple[float, float]) -> None:
        """Add to the numerator and the denominator of quotients."""
        for name, part in parts.items():
            self.sums[self.names.index(name)] += torch.tensor(part, dtype=self.sums.dtype, device=self.sums.device)

    def compute(self) -> Scalars:
        return dict(zip(self.names, self.sums[:, 0] / self.sums[:, 1], strict=True))


class BenchmarkMetrics(nn.Module):
    """Accuracy, response length, keywords (figure 6) and reasons of the verdicts of one benchmark's responses.

    `compute` returns those of `AccuracyAtK`, `response_tokens`, `keywords_per_response`, `keywords_per_1k_tokens` and,
    under its name, the share of responses with each `Reason`.

    Args:
        k: responses to each question.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.accuracy = AccuracyAtK(k)
        names = ("response_tokens", "keywords_per_response", "keywords_per_1k_tokens", *get_args(Reason))
        self.ratios = Ratios(*names)

    def update(self, groups: Sequence[Sequence[ScoredRollout]]) -> None:
        """Add questions, each with its k responses."""
        scored = [s for group in groups for s in group]
        num_tokens = sum(len(s.rollout.token_ids) for s in scored)
        keywords = sum(count_keywords(s.rollout.text) for s in scored)
        reasons = Counter(s.verdict.reason for s in scored)
        self.accuracy.update([[s.verdict.reward for s in group] for group in groups])
        self.ratios.update(
            response_tokens=(num_tokens, len(scored)),
            keywords_per_response=(keywords, len(scored)),
            keywords_per_1k_tokens=(1000 * keywords, num_tokens),
            **{reason: (reasons[reason], len(scored)) for reason in get_args(Reason)},
        )

    def compute(self, across: ProcessGroup | None = None) -> Scalars:
        """Compute all metrics over the ranks of a process group; None: over all ranks. Collective."""
        self.accuracy.process_group = self.ratios.process_group = across
        return {**self.accuracy.compute(), **self.ratios.compute()}


class LengthDistribution(Metric):
    """Distribution of response lengths in tokens, exact up to `MAX_LENGTH`.

    `compute` returns `length_r0` and `length_r1`, the means by reward; `length_p50` and `length_p90`, the smallest
    lengths that half and nine tenths of the responses do not exceed; and `length_max`.
    """

    full_state_update = False
    counts: Tensor  # [2, MAX_LENGTH + 1], responses by reward and length
    MAX_LENGTH = 2**16

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(2, self.MAX_LENGTH + 1, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, lengths: Sequence[int], rewards: Sequence[int]) -> None:
        """Add responses by number of tokens and reward."""
        for length, reward in zip(lengths, rewards, strict=True):
            self.counts[reward, min(length, self.MAX_LENGTH)] += 1

    def compute(self) -> Scalars:
        lengths = torch.arange(self.MAX_LENGTH + 1, device=self.counts.device)
        means = (self.counts * lengths).sum(1) / self.counts.sum(1)
        seen = self.counts.sum(0).cumsum(0)
        least = [torch.searchsorted(seen, torch.ceil(share * seen[-1]).long()) for share in (0.5, 0.9, 1.0)]
        quantiles = dict(zip(("length_p50", "length_p90", "length_max"), least, strict=True))
        return {"length_r0": means[0], "length_r1": means[1], **{k: v.double() for k, v in quantiles.items()}}


class CorrectionRate(Metric):
    """Effect of one revision on first attempts (Generate-then-Revise).

    `compute` returns `acc1`, `acc2`, `correction_rate` = (acc2 - acc1) / (1 - acc1), `wrong_to_right_rate` of the wrong
    and `right_to_wrong_rate` of the right first attempts, each with its `_se`, and the counts `wrong_to_right` and
    `right_to_wrong`. A rate with an empty denominator (no wrong, or no right first attempts) is 0, its error nan.

    Every rate is a ratio of two sums over questions; its standard error is the ratio estimator's, with the pairs of a
    question as one cluster. Counts of a cluster: pairs, first right, second right, wrong to right.
    """

    full_state_update = False
    clusters: Tensor  # number of clusters
    sums: Tensor  # [4], sums of the clusters' counts
    products: Tensor  # [4, 4], sums of their outer products

    def __init__(self) -> None:
        super().__init__()
        self.add_state("clusters", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(4, 4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, first: Sequence[int], second: Sequence[int], questions: Sequence[int | str] | None = None) -> None:
        """Add pairs of rewards.

        Args:
            first: rewards of the first attempts.
            second: rewards of their revisions, in the same order.
            questions: the question of each pair; all pairs of a question belong to one call. None: all differ.
        """
        keys = range(len(first)) if questions is None else questions
        assert len(first) == len(second) == len(keys)
        clusters: dict[int | str, list[int]] = {}
        for key, a, b in zip(keys, first, second, strict=True):
            cluster = clusters.setdefault(key, [0, 0, 0, 0])
            for i, value in enumerate((1, a, b, int(b > a))):
                cluster[i] += value
        rows = torch.tensor(list(clusters.values()), dtype=self.sums.dtype, device=self.sums.device).reshape(-1, 4)
        self.clusters += len(rows)
        self.sums += rows.sum(0)
        self.products += rows.T @ rows

    def compute(self) -> Scalars:
        pairs, right, revised, fixed = torch.eye(4, dtype=self.sums.dtype, device=self.sums.device)
        wrong, broken = pairs - right, right + fixed - revised
        ratios = {
            "acc1": (right, pairs),
            "acc2": (revised, pairs),
            "correction_rate": (revised - right, wrong),
            "wrong_to_right_rate": (fixed, wrong),
            "right_to_wrong_rate": (broken, right),
        }
        scalars = {"wrong_to_right": fixed @ self.sums, "right_to_wrong": broken @ self.sums}
        for name, (numerator, denominator) in ratios.items():
            scalars[name], scalars[f"{name}_se"] = self._ratio(numerator, denominator)
        return scalars

    def _ratio(self, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        """Return a ratio of two sums, each given by its weights [4] on a cluster's counts, and its standard error."""
        below = denominator @ self.sums
        if below == 0:
            return below / self.sums[0], torch.full_like(below, torch.nan)  # nan without any pairs
        value = numerator @ self.sums / below
        residual = numerator - value * denominator
        squares = (residual @ self.products @ residual).clamp(min=0)
        error = (squares * self.clusters / (self.clusters - 1)).sqrt() / below
        return value, torch.where(self.clusters > 1, error, torch.nan)
