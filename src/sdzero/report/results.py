"""What the evaluations say: a sentence per step of the method, and the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sdzero.report.run_folder import MODELS, RunFolder
from sdzero.types import benchmark_of

Row = dict[str, Any]
"""A model's row of summary.json."""


@dataclass(frozen=True)
class Figure:
    """One line of the table: what it is, what that means, and one cell a model."""

    label: str
    hint: str
    cells: list[str]


def evaluation_size(run: RunFolder, rows: Sequence[Row]) -> tuple[int, int]:
    """Held-out questions, and answers to each; zeros where nothing is evaluated."""
    if not rows:
        return 0, 0
    rewards = _rewards(run, rows[0])
    return len(rewards), max(map(len, rewards.values()))


def benchmarks(run: RunFolder, rows: Sequence[Row]) -> list[str]:
    """Names of the evaluation's benchmarks, in order; none where there is one, whose figures are the whole."""
    if not rows:
        return []
    results, names = run.results(rows[0]["stage"]), dict.fromkeys(map(benchmark_of, _rewards(run, rows[0])))
    return [name for name in names if f"eval/{name}/avg_at_k" in results]


def _rewards(run: RunFolder, row: Row) -> dict[str, list[int]]:
    return json.loads((run.path / row["stage"] / "eval/rewards.json").read_text())


def headline(rows: Sequence[Row], num_questions: int, num_answers: int, num_benchmarks: int = 0) -> list[str]:
    """What happened, in plain words: a gain below two standard errors is not called one."""
    if not rows:
        return ["No model has been evaluated yet."]
    name, score = f"avg@{num_answers}", plus_minus(rows[0]["accuracy"], rows[0]["accuracy_se"])
    model = "The base model" if rows[0]["stage"] == "base" else MODELS[rows[0]["stage"]]
    of = f", averaged over {num_benchmarks} benchmarks" if num_benchmarks else ""
    first = f"{model} has an {name} of {score} on {num_questions} held-out questions{of}."
    return [first, *(_step(name, *pair) for pair in pairwise(rows))]


def _step(name: str, before: Row, row: Row) -> str:
    """What a model did to the figure `name` and to the length of answers."""
    gain, error = row["accuracy_gain"], row["accuracy_gain_se"]
    places = f"from {before['accuracy']:.3f} to {row['accuracy']:.3f}"
    change = plus_minus(gain, error, "+.3f")
    if error is None:
        told = f"moved {name} {places} ({change}, without an error: a single question has none)"
    elif abs(gain) < 2 * error:
        told = f"did not clearly change {name}: {places} ({change}, within its error)"
    else:
        told = f"{'raised' if gain > 0 else 'lowered'} {name} {places} ({change})"
    tokens, tokens_before = row["mean_response_tokens"], before["mean_response_tokens"]
    ratio = tokens / tokens_before
    share = f"{ratio:.0%} of" if ratio < 1 else f"{ratio:.1f} times"
    lengths = f"with {share} the tokens ({tokens_before:.0f} → {tokens:.0f})"
    return f"{MODELS[row['stage']]} {told}, {lengths}."


def table(run: RunFolder, rows: Sequence[Row], num_questions: int, num_answers: int) -> list[Figure]:
    """The figures of summary.json and the rates behind its counts, one column a model."""
    results = [run.results(row["stage"]) for row in rows]
    k = num_answers

    def flips(kind: str) -> list[str]:
        return [
            _count(row[kind]) + _share(r.get(f"eval/revise_{kind}_rate"), r.get(f"eval/revise_{kind}_rate_se"))
            for row, r in zip(rows, results, strict=True)
        ]

    def pairs(key: str, form: str = ".3f") -> list[str]:
        return [plus_minus(row.get(key), row.get(f"{key}_se"), form) for row in rows]

    names = benchmarks(run, rows)
    mean = f"; the mean of the {len(names)} benchmarks below" if names else ""
    again = "eval/resample_wrong_to_right_rate"
    return [
        Figure(
            f"avg@{k}", f"share of right answers: {num_questions} questions, {k} answers each{mean}", pairs("accuracy")
        ),
        *(
            Figure(
                f"avg@{k}, {name}",
                "the same for one benchmark",
                [plus_minus(r.get(f"eval/{name}/avg_at_k"), r.get(f"eval/{name}/avg_at_k_se")) for r in results],
            )
            for name in names
        ),
        Figure("gain", "over the model to the left, paired question by question", pairs("accuracy_gain", "+.3f")),
        Figure(f"pass@{k}", f"share of questions with a right one among {k} answers", pairs(f"pass_at_{k}")),
        Figure("tokens", "mean length of an answer", [f"{row['mean_response_tokens']:.1f}" for row in rows]),
        Figure(
            "revision phrases", "“wait”, “let me start over”, … per answer", [f"{r['keyword_rate']:.2f}" for r in rows]
        ),
        Figure(
            "wrong → right", "first attempts that one revision mends; share of the wrong ones", flips("wrong_to_right")
        ),
        Figure("right → wrong", "first attempts that it breaks; share of the right ones", flips("right_to_wrong")),
        Figure(
            "resampled → right",
            "share of wrong attempts whose question a plain second answer gets right: what a revision has to beat",
            [plus_minus(r.get(again), r.get(f"{again}_se")) for r in results],
        ),
        Figure("generations", "sampled to train the model (evaluation apart)", _counts(rows, "num_generations")),
        Figure("tokens sampled", "in those generations", _counts(rows, "num_tokens_sampled")),
        Figure("tokens trained on", "student's and teacher's, times the epochs", _counts(rows, "num_tokens_trained")),
        Figure("seconds", "all stages of the model, evaluation too", [f"{row['seconds']:,.0f}" for row in rows]),
    ]


def plus_minus(value: float | None, error: float | None, form: str = ".3f") -> str:
    """`0.758 ± 0.011`; a dash for no value, the value alone where it has no error."""
    if value is None:
        return "–"
    shown = format(value, form).replace("-", "−")
    return shown if error is None else f"{shown} ±\N{NO-BREAK SPACE}{error:{form.lstrip('+')}}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _share(value: float | None, error: float | None) -> str:
    return "" if value is None else f" ({plus_minus(value, error, '.2f')})"


def _counts(rows: Sequence[Row], key: str) -> list[str]:
    return [f"{row[key]:,}" if row[key] else "–" for row in rows]
