"""What the token viewer shows: the responses with the largest KL, their tokens with both models' guesses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd

SHARES = {0: 30, 1: 10}
"""Responses shown by reward."""
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
    """A response in the list; its index is that of its data."""

    question: str
    reward: int
    reason: str
    step: int
    peak: float


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
    shown = _within_budget(_by_interest(rows))
    shown.sort(key=lambda row: (row["reward"], -_peak(row)))  # wrong ones first
    choices = [
        Choice(row["text"][:LABEL_CHARACTERS], int(row["reward"]), row["reason"], int(row["step"]), _peak(row))
        for row in shown
    ]
    scale = {"reward": _scale([row["token_kl_reward"] for row in shown]), "kl": _scale([row["kl"] for row in shown])}
    return Viewer(choices, {"scale": scale, "responses": [_data(row) for row in shown]}, len(rows))


def _peak(row: Row) -> float:
    return float(max(row["kl"], default=0.0))


def _by_interest(rows: Sequence[Row]) -> list[Row]:
    """The largest peaks of wrong and of right responses, three to one, in an order that any cut keeps so."""
    ranked: list[tuple[float, Row]] = []
    for reward, share in SHARES.items():
        group = sorted((row for row in rows if row["reward"] == reward), key=_peak, reverse=True)
        spare = max(0, SHARES[1 - reward] - (len(rows) - len(group)))  # where the other kind is scarce
        ranked += [(rank / share, row) for rank, row in enumerate(group[: share + spare])]
    return [row for _, row in sorted(ranked, key=lambda item: item[0])]


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
    """Nats of the full colour: the 99th percentile, so that one extreme token does not pale all others."""
    every = np.abs(np.concatenate([np.asarray(v, dtype=float) for v in values]))
    return round(max(float(np.quantile(every, 0.99)) if every.size else 0.0, LEAST_SCALE), 1)
