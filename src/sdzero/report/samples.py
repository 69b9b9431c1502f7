"""Samples of the evaluations: the same questions answered by each model, with revision phrases marked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from sdzero.evaluation.keywords import count_keywords, keyword_spans
from sdzero.prompts import ControlPhrases
from sdzero.report.run_folder import RunFolder
from sdzero.report.templates import embed

NUM_QUESTIONS = 6
MAX_CHARACTERS = 4_000

Segments = list[tuple[str, bool]]
"""A text in pieces; true marks a revision phrase."""


class SampleView:
    """First questions that every model with samples has answered, as the report and notebooks show them.

    Args:
        run: a run.
        num: maximum number of questions.
        with_keywords: prefer questions to which a model other than the first answers with a revision keyword.
    """

    def __init__(self, run: RunFolder, num: int = NUM_QUESTIONS, with_keywords: bool = False) -> None:
        by_model: dict[str, dict[str, dict[str, Any]]] = {}
        for model in run.models:
            for row in run.samples(model.evaluation):
                by_model.setdefault(model.label, {}).setdefault(row["question"], row)
        first, *others = by_model.values() or [{}]
        shared = [question for question in first if all(question in rows for rows in others)]
        self.num_shared = len(shared)
        if with_keywords:
            shared.sort(key=lambda q: not any(count_keywords(rows[q]["response"]) for rows in others))  # stable
        phrases = control_phrases(run.configs())
        self.comparisons = [
            {
                "text": first[question]["text"],
                "gold": first[question]["answer"],
                "answers": [_answer(label, rows[question], phrases) for label, rows in by_model.items()],
            }
            for question in shared[:num]
        ]

    def _repr_html_(self) -> str:
        return embed("samples.html", 480, samples=self, viewer=None)


def _answer(model: str, row: Mapping[str, Any], phrases: Sequence[str]) -> dict[str, Any]:
    """Return a model's answer with its verdict, and its revision where the evaluation sampled one."""
    parsed, revision = None if row["reward"] else row.get("parsed"), row.get("revision")
    return {
        "model": model,
        "reward": row["reward"],
        "verdict": row["reason"] if parsed is None else f"{row['reason']}, parsed as {parsed}",
        "num_tokens": row["num_tokens"],
        "segments": segment(row["response"], phrases),
        "revision": _answer(model, revision, phrases) if revision else None,
    }


def control_phrases(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return P_0 and P_1: the defaults and those of the stages' configs."""
    default = ControlPhrases()
    keys = ("control_phrases.correct", "control_phrases.incorrect")
    configured = {str(value) for config in configs for key, value in config.items() if key.endswith(keys)}
    return sorted({default.correct, default.incorrect, *configured})


def segment(text: str, phrases: Sequence[str]) -> Segments:
    """Split a text at its keywords (appendix E.1) and control phrases; cut it after `MAX_CHARACTERS`, with a note."""
    num_left_out = len(text) - MAX_CHARACTERS
    text = text[:MAX_CHARACTERS]
    matches = [match.span() for phrase in phrases for match in re.finditer(re.escape(phrase), text, re.IGNORECASE)]
    is_marked = [False] * len(text)
    for begin, end in (*keyword_spans(text), *matches):
        is_marked[begin:end] = [True] * (end - begin)
    groups = groupby(zip(text, is_marked, strict=True), key=lambda pair: pair[1])
    pieces = [("".join(character for character, _ in group), marked) for marked, group in groups]
    if num_left_out > 0:
        pieces.append((f" … {num_left_out:,} more characters", False))
    return pieces
