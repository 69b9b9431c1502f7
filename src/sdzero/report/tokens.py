"""What the token viewer shows: responses with the largest KL and a draw of others, with both models' guesses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd

NUM_LARGEST = {0: 18, 1: 6}
"""Responses with the largest KL, by reward."""
NUM_DRAWN = 16
"""Responses drawn evenly from the others: extremes alone would tell another story than the run."""
MAX_TOKENS = 800
"""Of one response: a window of this many around its largest KL."""
MAX_CHARACTERS = 1_200_000
"""Of all responses' data, so that the page stays below 2 MB."""
TOP = 5
LABEL_CHARACTERS, QUESTION_CHARACTERS = 120, 2_000
LEAST_SCALE = 0.5
"""Nats that get the full colour at least: a run of near-zero KL must not look like a storm."""

Row = dict[str, Any]
"""A response as TokenKLRecorder wrote it."""


@dataclass(frozen=True)
class Choice:
    """A response in the list; its index is that of its data. `drawn`: it is there without regard to its KL."""

    question: str
    reward: int
    reason: str
    step: int
    peak: float
    drawn: bool


@dataclass(frozen=True)
class Viewer:
    """The list, the data behind it (JSON), and how many responses the run recorded."""

    choices: list[Choice]
    data: dict[str, Any]
    num_recorded: int


def viewer(frame: pd.DataFrame) -> Viewer | None:
    """Args: frame: what TokenKLRecorder left, one row a response. Returns: None where it left nothing."""
    if frame.empty:
        return None
    columns = [*map(str, frame.columns)]
    rows = [dict(zip(columns, values, strict=True)) for values in frame.itertuples(index=False)]
    shown = _within_budget([*_by_interest(rows)])
    shown.sort(key=lambda row: (row["drawn"], row["reward"]))  # wrong ones first; the sort keeps ranks
    choices = [
        Choice(
            row["text"][:LABEL_CHARACTERS],
            int(row["reward"]),
            row["reason"],
            int(row["step"]),
            _peak(row),
            row["drawn"],
        )
        for row in shown
    ]
    scale = {"reward": _scale([row["token_kl_reward"] for row in shown]), "kl": _scale([row["kl"] for row in shown])}
    return Viewer(choices, {"scale": scale, "responses": [_data(row) for row in shown]}, len(rows))


def _peak(row: Row) -> float:
    return float(max(row["kl"], default=0.0))


def _by_interest(rows: Sequence[Row]) -> Iterator[Row]:
    """The largest peaks of wrong and of right responses, and an even draw of the others; a cut keeps the mixture.

    Yields:
        Rows with one more key, `drawn`: whether the draw has chosen it.
    """
    largest: list[list[Row]] = []
    for reward, num in NUM_LARGEST.items():
        group = sorted((row for row in rows if row["reward"] == reward), key=_peak, reverse=True)
        spare = max(0, NUM_LARGEST[1 - reward] - (len(rows) - len(group)))  # where the other kind is scarce
        largest.append(group[: num + spare])
    taken = {id(row) for group in largest for row in group}
    others = [row for row in rows if id(row) not in taken]
    num_drawn = min(NUM_DRAWN, len(others))
    drawn = [{**others[i * len(others) // num_drawn], "drawn": True} for i in range(num_drawn)]
    groups = [*([{**row, "drawn": False} for row in group] for group in largest), drawn]
    ranked = [(rank / len(group), row) for group in groups for rank, row in enumerate(group)]
    yield from (row for _, row in sorted(ranked, key=lambda item: item[0]))


def _within_budget(rows: Sequence[Row]) -> list[Row]:
    sizes = accumulate(len(json.dumps(_data(row))) for row in rows)
    return [row for i, (row, size) in enumerate(zip(rows, sizes, strict=True)) if size <= MAX_CHARACTERS or i == 0]


def _data(row: Row) -> dict[str, Any]:
    total = len(row["tokens"])
    peak = int(np.argmax(row["kl"])) if total else 0
    start = max(0, min(peak - MAX_TOKENS // 2, total - MAX_TOKENS))
    window = range(start, min(start + MAX_TOKENS, total))
    return {
        "question": row["text"][:QUESTION_CHARACTERS],
        "gold": row["answer"],
        "verdict": row["reason"],
        "step": int(row["step"]),
        "start": start,
        "total": total,
        "tokens": [
            {
                "text": row["tokens"][t],
                "kl": _short(row["kl"][t]),
                "reward": _short(row["token_kl_reward"][t]),
                "student": _short(math.exp(row["student_logprob"][t])),
                "teacher": _short(math.exp(row["teacher_logprob"][t])),
                "student_top": _top(row["student_top"][t], row["student_top_prob"][t]),
                "teacher_top": _top(row["teacher_top"][t], row["teacher_top_prob"][t]),
            }
            for t in window
        ],
    }


def _top(tokens: Sequence[str], probabilities: Sequence[float]) -> list[tuple[str, float]]:
    return [(token, _short(p)) for token, p in zip(tokens[:TOP], probabilities[:TOP], strict=True)]


def _short(value: float) -> float:
    """Four significant digits: half the page's size, and more than anybody reads."""
    return float(f"{value:.4g}")


def _scale(values: Sequence[Sequence[float]]) -> float:
    """Nats of the full colour: the 97th percentile, so that one extreme token does not pale all others."""
    every = np.abs(np.concatenate([np.asarray(v, dtype=float) for v in values]))
    return round(max(float(np.quantile(every, 0.97)) if every.size else 0.0, LEAST_SCALE), 1)
