"""How the reviser's signal is spread over the tokens of a response (section 4.1, figure 4).

All functions take the frame of `RunFolder.token_kl`: a response a row, `kl` and `token_kl_reward` in nats, one value per
token. Standard errors are over responses; r=0 and r=1 stand apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sdzero.metrics import mean_and_error

NUM_BUCKETS = 20  # section 4.1


def bucket_means(values: Sequence[float], num_buckets: int = NUM_BUCKETS) -> np.ndarray:
    """[num_buckets], the means of equal buckets of a sequence of N values, in its order.

    Where N is no multiple of the number of buckets, a value across a border counts in both buckets by the part that
    lies there. So for every N, the means times N / num_buckets add up to the sum of the values.
    """
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    borders = np.linspace(0, len(values), num_buckets + 1)
    return np.diff(np.interp(borders, np.arange(len(sums)), sums)) * num_buckets / len(values)


def bucket_curve(frame: pd.DataFrame, value: str = "kl", num_buckets: int = NUM_BUCKETS) -> pd.DataFrame:
    """Figure 4: the tokens of each response sorted by `value`, largest first, in equal buckets; means over responses.

    Returns:
        Columns reward, bucket (1 holds the largest), mean, se, responses. A reward without responses has no rows.
    """
    return _curve(frame, value, num_buckets, lambda values: np.sort(values)[::-1])


def position_curve(frame: pd.DataFrame, value: str = "kl", num_buckets: int = NUM_BUCKETS) -> pd.DataFrame:
    """As `bucket_curve`, with the tokens in the order in which they stand: bucket 1 is the response's beginning."""
    return _curve(frame, value, num_buckets, np.asarray)


def _curve(frame: pd.DataFrame, value: str, num_buckets: int, arrange: Callable[[Any], np.ndarray]) -> pd.DataFrame:
    rows = []
    for reward, group in by_reward(frame):
        means = np.stack([bucket_means(arrange(values), num_buckets) for values in group[value]])
        for bucket, column in enumerate(means.T, start=1):
            mean, error = mean_and_error(column.tolist())
            rows.append((reward, bucket, mean, error, len(group)))
    return pd.DataFrame(rows, columns=pd.Index(["reward", "bucket", "mean", "se", "responses"]))


def by_reward(frame: pd.DataFrame) -> list[tuple[int, pd.DataFrame]]:
    """(reward, its responses), those rewards that have any."""
    return [(int(str(reward)), group) for reward, group in frame.groupby("reward")] if len(frame) else []
