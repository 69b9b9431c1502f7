"""Token viewer: recorded responses with the KL and both models' predictions at every token (figure 4, right)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
LABEL_CHARACTERS, QUESTION_CHARACTERS = 120, 2_000
MIN_SCALE = 0.5
"""Smallest scale in nats, so that a run of near-zero KL is shown pale."""

Row = dict[str, Any]
"""A response as TokenKLRecorder writes it."""


@dataclass(frozen=True)
class Choice:
    """Entry of the list of responses. `is_extreme`: it is among those with the largest KL."""

    question: str
    reward: int
    reason: str
    step: int
    peak: float
    is_extreme: bool


class TokenViewer:
    """List of responses and the JSON data behind it, as the report and notebooks show it.

    Args:
        frame: rows of `RunFolder.token_kl`. A column `first_wrong` holds indices of tokens to mark, or None.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        rows: list[Row] = [{str(key): value for key, value in row.items()} for row in frame.to_dict(orient="records")]
        shown = _within_budget([*_select(rows)])
        shown.sort(key=lambda row: (not row["is_extreme"], row["reward"]))  # stable: keeps ranks
        self.num_recorded = len(rows)
        self.choices = [
            Choice(
                row["text"][:LABEL_CHARACTERS],
                int(row["reward"]),
                row["reason"],
                int(row["step"]),
                _peak(row),
                row["is_extreme"],
            )
            for row in shown
        ]
        scale = {"reward": _scale(row["token_kl_reward"] for row in shown), "kl": _scale(row["kl"] for row in shown)}
        self.data = {"scale": scale, "responses": [_data(row) for row in shown]}

    def _repr_html_(self) -> str:
        return embed("token_viewer.html", 720, viewer=self)


def _peak(row: Row) -> float:
    return float(max(row["kl"], default=0.0))


def _select(rows: Sequence[Row]) -> Iterator[Row]:
    """Select the responses with the largest peaks by reward, and an even sample of the others, interleaved so that a
    cut keeps the mixture. Adds the key `is_extreme`."""
    extremes: list[list[Row]] = []
    for reward, num in NUM_EXTREME.items():
        group = sorted((row for row in rows if row["reward"] == reward), key=_peak, reverse=True)
        spare = max(0, NUM_EXTREME[1 - reward] - (len(rows) - len(group)))  # where the other reward is scarce
        extremes.append(group[: num + spare])
    taken = {id(row) for group in extremes for row in group}
    others = [row for row in rows if id(row) not in taken]
    num_even = min(NUM_EVEN, len(others))
    even = [{**others[i * len(others) // num_even], "is_extreme": False} for i in range(num_even)]
    groups = [*([{**row, "is_extreme": True} for row in group] for group in extremes), even]
    ranked = [(rank / len(group), row) for group in groups for rank, row in enumerate(group)]
    yield from (row for _, row in sorted(ranked, key=lambda item: item[0]))


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


def _scale(values: Iterator[Sequence[float]]) -> float:
    """Return the nats of the full colour: the 97th percentile, so that one extreme token does not pale all others."""
    every = np.abs(np.concatenate([[0.0], *(np.asarray(v, dtype=float) for v in values)]))[1:]
    return round(max(float(np.quantile(every, 0.97)) if every.size else 0.0, MIN_SCALE), 1)
