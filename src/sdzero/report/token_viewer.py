"""Token viewer: recorded responses with the KL and both models' predictions at every token (figure 4, right)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd

from sdzero.report.templates import embed

NUM_EXTREME = {0: 18, 1: 6}
"""Responses with the largest KL, by reward."""
NUM_EVEN = 16
"""Responses spaced evenly over the others: extremes alone would misrepresent the run."""
MAX_TOKENS = 800
"""Length of the window around the largest KL of a response."""
MAX_CHARACTERS = 1_200_000
"""Size of all responses' data, so that the page stays below 2 MB."""
TOP = 5
QUESTION_CHARACTERS = 2_000
MIN_SCALE = 0.5
"""Smallest scale in nats, so that a run of near-zero KL is shown pale."""

Row = dict[str, Any]
"""A response as TokenKLRecorder writes it, with `peak`, its largest KL."""


class TokenViewer:
    """List of responses and the JSON data behind it, as the report and notebooks show it.

    Args:
        frame: rows of `RunFolder.token_kl`. A column `first_wrong` holds indices of tokens to mark, or None.

    Attributes:
        num_recorded: number of rows.
        choices: rows of the list, `is_extreme` for those with the largest KL.
        data: content of the page's JSON.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        rows: list[Row] = [{str(key): value for key, value in row.items()} for row in frame.to_dict(orient="records")]
        rows = [{**row, "peak": float(max(row["kl"], default=0.0))} for row in rows]
        self.num_recorded = len(rows)
        self.choices = _within_budget([*_select(rows)])
        self.choices.sort(key=lambda row: (not row["is_extreme"], row["reward"]))  # stable: keeps ranks
        self.data = {
            "scale": {"reward": _scale(self.choices, "token_kl_reward"), "kl": _scale(self.choices, "kl")},
            "responses": [_data(row) for row in self.choices],
        }

    def _repr_html_(self) -> str:
        return embed("token_viewer.html", 720, viewer=self)


def _select(rows: Sequence[Row]) -> Iterator[Row]:
    """Select the responses with the largest peaks by reward, and an even sample of the others, interleaved so that a
    cut keeps the mixture. Adds the key `is_extreme`."""
    groups: list[list[Row]] = []
    for reward, num in NUM_EXTREME.items():
        group = sorted((row for row in rows if row["reward"] == reward), key=lambda row: row["peak"], reverse=True)
        spare = max(0, NUM_EXTREME[1 - reward] - (len(rows) - len(group)))  # where the other reward is scarce
        groups.append(group[: num + spare])
    taken = {id(row) for group in groups for row in group}
    others = [row for row in rows if id(row) not in taken]
    num_even = min(NUM_EVEN, len(others))
    groups.append([others[i * len(others) // num_even] for i in range(num_even)])
    ranked = [(rank / len(group), row) for group in groups for rank, row in enumerate(group)]
    for _, row in sorted(ranked, key=lambda item: item[0]):
        yield {**row, "is_extreme": id(row) in taken}


def _within_budget(rows: Sequence[Row]) -> list[Row]:
    sizes = accumulate(len(json.dumps(_data(row))) for row in rows)
    return [row for i, (row, size) in enumerate(zip(rows, sizes, strict=True)) if size <= MAX_CHARACTERS or i == 0]


def _data(row: Row) -> dict[str, Any]:
    total = len(row["tokens"])
    peak = int(np.argmax(row["kl"])) if total else 0
    start = max(0, min(peak - MAX_TOKENS // 2, total - MAX_TOKENS))
    first_wrong = row.get("first_wrong")
    return {
        "question": row["text"][:QUESTION_CHARACTERS],
        "gold": row["answer"],
        "verdict": row["reason"],
        "step": int(row["step"]),
        "start": start,
        "total": total,
        "first_wrong": None if first_wrong is None or math.isnan(first_wrong) else int(first_wrong) - start,
        "tokens": [
            {
                "text": row["tokens"][t],
                "kl": _round(row["kl"][t]),
                "reward": _round(row["token_kl_reward"][t]),
                "student": _round(math.exp(row["student_logprob"][t])),
                "teacher": _round(math.exp(row["teacher_logprob"][t])),
                "student_top": _top(row["student_top"][t], row["student_top_prob"][t]),
                "teacher_top": _top(row["teacher_top"][t], row["teacher_top_prob"][t]),
            }
            for t in range(start, min(start + MAX_TOKENS, total))
        ],
    }


def _top(tokens: Sequence[str], probabilities: Sequence[float]) -> list[tuple[str, float]]:
    return [(token, _round(p)) for token, p in zip(tokens[:TOP], probabilities[:TOP], strict=True)]


def _round(value: float) -> float:
    """Round to four significant digits: halves the size of the page."""
    return float(f"{value:.4g}")


def _scale(rows: Sequence[Row], key: str) -> float:
    """Return the nats of the full colour: the 97th percentile, so that one extreme token does not pale all others."""
    values = np.abs(np.concatenate([*(row[key] for row in rows), np.empty(0)]))
    return round(max(float(np.quantile(values, 0.97)) if values.size else 0.0, MIN_SCALE), 1)
