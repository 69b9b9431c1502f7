"""Results of the evaluations: one sentence per model, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdzero.pipeline.summary import read_json, summarize
from sdzero.report.run_folder import RunFolder
from sdzero.types import benchmark_of


@dataclass(frozen=True)
class Evaluated:
    """A model with its evaluation.

    Attributes:
        label: the model's name in tables.
        row: its row of summary.json.
        results: metrics of its evaluation, by tag.
        rewards: rewards of its answers, by question id.
        before: the evaluated model that it started from, if any.
    """

    label: str
    row: dict[str, Any]
    results: dict[str, float | None]
    rewards: dict[str, list[int]]
    before: Evaluated | None = None

    @property
    def num_answers(self) -> int:
        """Answers per question."""
        return max(map(len, self.rewards.values()))

    @property
    def benchmarks(self) -> list[str]:
        """Benchmarks with metrics of their own, in order; none where there is only one."""
        names = dict.fromkeys(map(benchmark_of, self.rewards))
        return [name for name in names if f"eval/{name}/avg_at_k" in self.results]


def evaluated_models(run: RunFolder) -> list[Evaluated]:
    """Return the models whose evaluation has finished, in the order of the recipe."""
    found: dict[str, Evaluated] = {}
    models = {model.name: model for model in run.models}
    for row in summarize(run.path, run.lineage):
        model = models[row["stage"]]
        rewards = read_json(run.path / model.evaluation / "rewards.json")
        before = found.get(model.starts_from or "")
        found[model.name] = Evaluated(model.label, row, run.results(model), rewards, before)
    return [*found.values()]


def headline(models: Sequence[Evaluated]) -> list[str]:
    """Describe the results in plain words; a change below two standard errors is not called a gain."""
    return [_describe(model) for model in models] or ["No model has been evaluated yet."]


def _describe(model: Evaluated) -> str:
    row, name = model.row, f"avg@{model.num_answers}"
    if model.before is None or row["accuracy_gain"] is None:
        score, num = plus_minus(row["accuracy"], row["accuracy_se"]), len(model.benchmarks)
        average = f", averaged over {num} benchmarks" if num else ""
        return f"{model.label}: {name} is {score} on {len(model.rewards)} held-out questions{average}."
    before, gain, error = model.before.row, row["accuracy_gain"], row["accuracy_gain_se"]
    values = f"from {before['accuracy']:.3f} to {row['accuracy']:.3f}"
    change = plus_minus(gain, error, "+.3f")
    if error is None:
        effect = f"{name} changed {values} ({change}, without an error: there is a single question)"
    elif abs(gain) < 2 * error:
        effect = f"no clear change of {name}, {values} ({change}, within two standard errors)"
    else:
        effect = f"{name} {'rose' if gain > 0 else 'fell'} {values} ({change})"
    tokens, tokens_before = row["mean_response_tokens"], before["mean_response_tokens"]
    ratio = tokens / tokens_before
    share = f"{ratio:.0%} of" if ratio < 1 else f"{ratio:.1f} times"
    lengths = f"{share} the tokens of {model.before.label} ({tokens_before:.0f} → {tokens:.0f})"
    return f"{model.label}: {effect}, with {lengths}."


def table(models: Sequence[Evaluated]) -> list[tuple[str, str, list[str]]]:
    """Build the table of summary.json and the rates behind its counts.

    Returns:
        Rows of label, explanation and one cell per model.
    """
    if not models:
        return []
    rows, results, k = [m.row for m in models], [m.results for m in models], models[0].num_answers
    benchmarks = models[0].benchmarks

    def metric(tag: str) -> list[str]:
        return [plus_minus(r.get(f"eval/{tag}"), r.get(f"eval/{tag}_se")) for r in results]

    def summary(key: str, form: str = ".3f") -> list[str]:
        return [plus_minus(row.get(key), row.get(f"{key}_se"), form) for row in rows]

    def flips(kind: str) -> list[str]:
        rate = f"eval/revise_{kind}_rate"
        return [
            plus_minus(row[kind], None, ".0f")
            + (f" ({plus_minus(r[rate], r.get(f'{rate}_se'), '.2f')})" if r.get(rate) is not None else "")
            for row, r in zip(rows, results, strict=True)
        ]

    def count(key: str) -> list[str]:
        return [f"{row[key]:,}" if row[key] else "–" for row in rows]

    mean = f"; the mean of the {len(benchmarks)} benchmarks below" if benchmarks else ""
    questions = f"share of right answers: {len(models[0].rewards)} questions, {k} answers each{mean}"
    resampled = "share of wrong attempts with a right second, independent answer: what a revision has to beat"
    return [
        (f"avg@{k}", questions, summary("accuracy")),
        *((f"avg@{k}, {name}", "of one benchmark", metric(f"{name}/avg_at_k")) for name in benchmarks),
        ("gain", "over the model it started from, paired by question", summary("accuracy_gain", "+.3f")),
        (f"pass@{k}", f"share of questions with a right answer among {k}", summary(f"pass_at_{k}")),
        ("tokens", "mean length of an answer", summary("mean_response_tokens", ".1f")),
        ("revision phrases", "“wait”, “let me start over”, … per answer", summary("keyword_rate", ".2f")),
        ("wrong → right", "first attempts corrected by one revision; of the wrong ones", flips("wrong_to_right")),
        ("right → wrong", "first attempts broken by one revision; of the right ones", flips("right_to_wrong")),
        ("resampled → right", resampled, metric("resample_wrong_to_right_rate")),
        ("generations", "sampled to train the model, without evaluations", count("num_generations")),
        ("tokens sampled", "in those generations", count("num_tokens_sampled")),
        ("tokens trained on", "student's and teacher's, times the epochs", count("num_tokens_trained")),
        ("seconds", "all stages of the model, with its evaluation", summary("seconds", ",.0f")),
    ]


def plus_minus(value: float | None, error: float | None, form: str = ".3f") -> str:
    """Format `0.758 ± 0.011`; a dash without a value, the value alone without an error."""
    if value is None:
        return "–"
    shown = format(value, form).replace("-", "−")
    return shown if error is None else f"{shown} ±\N{NO-BREAK SPACE}{error:{form.lstrip('+')}}"
