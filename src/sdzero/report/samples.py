"""Answers before and after, side by side, with the phrases that speak of revising."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdzero.evaluation.keywords import keyword_spans
from sdzero.prompts import ControlPhrases
from sdzero.report.run_folder import MODELS, RunFolder

NUM_QUESTIONS = 6
MAX_CHARACTERS = 4_000

Segments = list[tuple[str, bool]]
"""A text in pieces, each with whether it is a revision phrase."""


@dataclass(frozen=True)
class Answer:
    """A model's answer; `verdict` is the verifier's, `revision` what it made of it when told the verdict."""

    model: str
    reward: int
    verdict: str
    num_tokens: int
    segments: Segments
    revision: Answer | None = None


@dataclass(frozen=True)
class Comparison:
    """One held-out question and the first answer of each model."""

    text: str
    gold: str
    answers: list[Answer]


def comparisons(run: RunFolder, phrases: Sequence[str]) -> tuple[list[Comparison], int]:
    """The first questions that every model with samples has answered, and how many such questions there are."""
    first: dict[str, dict[str, dict[str, Any]]] = {}
    for stage, model in MODELS.items():
        for row in run.samples(f"{stage}/eval"):
            first.setdefault(model, {}).setdefault(row["question"], row)
    if not first:
        return [], 0
    shared = [q for q in next(iter(first.values())) if all(q in rows for rows in first.values())]
    found = []
    for question in shared[:NUM_QUESTIONS]:
        answers = [_answer(model, rows[question], phrases) for model, rows in first.items()]
        row = next(iter(first.values()))[question]
        found.append(Comparison(row["text"], row["answer"], answers))
    return found, len(shared)


def _answer(model: str, row: Mapping[str, Any], phrases: Sequence[str]) -> Answer:
    read = f", read as {row['parsed']}" if row.get("parsed") is not None else ""
    revision = row.get("revision")
    return Answer(
        model,
        row["reward"],
        row["reason"] + (read if not row["reward"] else ""),
        row["num_tokens"],
        segments(row["response"], phrases),
        _answer(model, revision, phrases) if revision else None,
    )


def control_phrases(lineage: Mapping[str, Any]) -> list[str]:
    """P_0 and P_1, the default ones and those that the run's configs name."""
    default = ControlPhrases()
    configs = [record["config"] for record in lineage.values()]
    keys = ("control_phrases.correct", "control_phrases.incorrect")
    named = {str(value) for config in configs for key, value in config.items() if key.endswith(keys)}
    return sorted({default.correct, default.incorrect, *named})


def segments(text: str, phrases: Sequence[str]) -> Segments:
    """Cuts a text at its keywords (appendix E.1) and control phrases; a long text ends with what it lacks."""
    left_out = len(text) - MAX_CHARACTERS
    text = text[:MAX_CHARACTERS]
    said = [match.span() for phrase in phrases for match in re.finditer(re.escape(phrase), text, re.IGNORECASE)]
    pieces: Segments = []
    end = 0
    for begin, stop in _merged([*keyword_spans(text), *said]):
        pieces += [(text[end:begin], False), (text[begin:stop], True)]
        end = stop
    pieces.append((text[end:], False))
    if left_out > 0:
        pieces.append((f" … {left_out:,} more characters", False))
    return [piece for piece in pieces if piece[0]]


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that overlap as one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
