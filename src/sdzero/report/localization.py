"""Distribution of the token KL over the tokens of a response (section 4.1, figure 4).

All functions take the frame of `RunFolder.token_kl`: one row per response, with `kl` in nats, one value per token.
Standard errors are over responses; r=0 and r=1 are separate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sdzero.evaluation.statistics import mean_and_error, top_share

NUM_BUCKETS = 20  # section 4.1


def bucket_means(values: Sequence[float] | np.ndarray, num_buckets: int = NUM_BUCKETS) -> np.ndarray:
    """Return [num_buckets], the means of equal buckets of a sequence of N values, in order.

    If N is not a multiple of the number of buckets, a value across a border counts in both in proportion. So for every
    N, the means times N / num_buckets add up to the sum of the values.
    """
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    borders = np.linspace(0, len(values), num_buckets + 1)
    return np.diff(np.interp(borders, np.arange(len(sums)), sums)) * num_buckets / len(values)


def bucket_curve(frame: pd.DataFrame, num_buckets: int = NUM_BUCKETS) -> pd.DataFrame:
    """Compute figure 4: each response's tokens sorted by KL, largest first, in equal buckets; means over responses.

    Returns:
        Columns reward, bucket (1 holds the largest), mean, se, responses. A reward without responses has no rows.
    """
    return _curve(frame, num_buckets, lambda values: np.sort(values)[::-1])


def position_curve(frame: pd.DataFrame, num_buckets: int = NUM_BUCKETS) -> pd.DataFrame:
    """Compute `bucket_curve` without sorting: bucket 1 is the beginning of the response."""
    return _curve(frame, num_buckets, np.asarray)


def _curve(frame: pd.DataFrame, num_buckets: int, arrange: Callable[[Any], np.ndarray]) -> pd.DataFrame:
    rows = []
    for reward, group in frame.groupby("reward") if len(frame) else ():
        means = np.stack([bucket_means(arrange(values), num_buckets) for values in group["kl"]])
        for bucket, column in enumerate(means.T, start=1):
            mean, error = mean_and_error(column.tolist())
            rows.append((reward, bucket, mean, error, len(group)))
    return pd.DataFrame(rows, columns=pd.Index(["reward", "bucket", "mean", "se", "responses"]))


def concentration(frame: pd.DataFrame, share: float = 0.1) -> pd.DataFrame:
    """Measure the concentration of the KL on few tokens.

    Returns:
        One row per reward: `kl`, mean KL of a response's tokens in nats; `top_share`, the part of a response's KL on
        the `share` of its tokens with the largest KL; `half`, the part of its tokens that hold half of its KL; each
        with its `_se`; and responses. A response without any KL has neither share.
    """
    rows = []
    for reward, group in frame.groupby("reward") if len(frame) else ():
        with_kl = [values for values in group["kl"] if sum(values) > 0]
        statistics = {
            "kl": [float(np.mean(values)) for values in group["kl"]],
            "top_share": [top_share(values, share) for values in with_kl],
            "half": [_share_of_half(values) for values in with_kl],
        }
        row = {"reward": reward}
        for name, values in statistics.items():
            row[name], row[f"{name}_se"] = mean_and_error(values)
        rows.append({**row, "responses": len(group)})
    return pd.DataFrame(rows)


def _share_of_half(values: Sequence[float]) -> float:
    """Return the smallest share of a sequence's values that add up to half of its sum."""
    sums = np.cumsum(np.sort(values)[::-1])
    return (int(np.searchsorted(sums, sums[-1] / 2)) + 1) / len(sums)
