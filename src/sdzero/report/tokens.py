"""What the token viewer shows: the responses with the largest KL, their tokens with both models' guesses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

NUM_WRONG, NUM_RIGHT = 30, 10
MAX_TOKENS = 800
"""Of one response: a window of this many around its largest KL."""
MAX_CHARACTERS = 1_200_000
"""Of all responses' data, so that the page stays below 2 MB."""
TOP = 5
QUESTION_CHARACTERS = 2_000
LEAST_SCALE = 0.5
"""Nats that get the full colour at least: a run of near-zero KL must not look like a storm."""


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
    frame = frame.assign(peak=[max(kl, default=0.0) for kl in frame["kl"]])
    shown = [row for row, _ in _within_budget(_by_interest(frame))]
    shown.sort(key=lambda row: (row["reward"], -row["peak"]))  # wrong ones first
    choices = [
        Choice(row["text"][:200], int(row["reward"]), row["reason"], int(row["step"]), float(row["peak"])) for row in shown
    ]
    scale = {"reward": _scale(row["token_kl_reward"] for row in shown), "kl": _scale(row["kl"] for row in shown)}
    return Viewer(choices, {"scale": scale, "responses": [_data(row) for row in shown]}, len(frame))


def _by_interest(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The largest peaks of wrong and of right responses, three to one, in an order that any cut keeps so."""
    ranked: list[tuple[float, dict[str, Any]]] = []
    counts = {0: NUM_WRONG, 1: NUM_RIGHT}
    for reward, share in counts.items():
        rows = frame[frame["reward"] == reward].sort_values("peak", ascending=False, kind="stable")
        others = int((frame["reward"] != reward).sum())
        num = share + max(0, counts[1 - reward] - others)  # where the other kind is scarce, more of this
        ranked += [(rank / share, row) for rank, row in enumerate(rows.head(num).to_dict("records"))]
    return [row for _, row in sorted(ranked, key=lambda item: item[0])]


def _within_budget(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    kept: list[tuple[dict[str, Any], int]] = []
    left = MAX_CHARACTERS
    for row in rows:
        size = len(json.dumps(_data(row)))
        left -= size
        if left < 0 and kept:
            break
        kept.append((row, size))
    return kept


def _data(row: dict[str, Any]) -> dict[str, Any]:
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


def _scale(values: Any) -> float:
    """Nats of the full colour: the 99th percentile, so that one extreme token does not pale all others."""
    every = np.abs(np.concatenate([np.asarray(v, dtype=float) for v in values]))
    return round(max(float(np.quantile(every, 0.99)) if every.size else 0.0, LEAST_SCALE), 1)
