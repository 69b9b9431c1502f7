"""Sampled answers as text: the same question through the models, and attempts with their revisions."""

from __future__ import annotations

from textwrap import indent
from typing import Any

from sdzero.evaluation.keywords import count_keywords
from sdzero.report.run_folder import MODELS, RunFolder

Row = dict[str, Any]


def same_question(run: RunFolder) -> str:
    """One question's answers by all models (figure 6, left): the first whose answer by SRT speaks of revising.

    Without one, the first that all evaluated models answered; empty where no evaluation kept samples.
    """
    kept = {model: run.samples(f"{model}/eval") for model in MODELS}
    answers = {model: {row["question"]: row for row in reversed(rows)} for model, rows in kept.items() if rows}
    common = [row for row in kept["srt"] or kept["base"] if all(row["question"] in a for a in answers.values())]
    if not common:
        return ""
    row = next((row for row in common if count_keywords(row["response"])), common[0])
    return "\n\n".join([_asked(row), *(_told(MODELS[model], a[row["question"]]) for model, a in answers.items())])


def revisions(run: RunFolder, num: int) -> str:
    """The first `num` first attempts with their revisions that each model's evaluation kept; empty where none did."""
    parts = []
    for model in MODELS:
        for row in [row for row in run.samples(f"{model}/eval") if row["revision"]][:num]:
            parts += [_asked(row), _told(MODELS[model], row), _told(f"{MODELS[model]}, revised", row["revision"])]
    return "\n\n".join(parts)


def _asked(row: Row) -> str:
    return f"{row['text']}   (answer: {row['answer']})"


def _told(who: str, row: Row) -> str:
    return f"  {who}: {row['reason']}, {row['num_tokens']} tokens\n{indent(row['response'], ' ' * 4)}"
