"""Summary of a run, a row per model, and of one evaluation, a row per benchmark."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdzero.evaluation.statistics import average, paired_differences
from sdzero.types import BUDGET, benchmark_of
from sdzero.utils.lineage import Lineage
from sdzero.utils.recipe import Model

Rewards = dict[str, list[int]]
"""Rewards of the responses to each question, by its id."""


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty without one."""
    return json.loads(path.read_text()) if path.is_file() else {}


def summarize(out: Path, lineage: Lineage) -> list[dict[str, Any]]:
    """One row per evaluated model, in the recipe's order. A model that has not been evaluated (yet) has none.

    Budgets are what training the model cost beyond the one it started from (table 3); evaluations are not counted.
    """
    rewards = {model.name: read_json(out / model.evaluation / "rewards.json") for model in lineage.models}
    return [
        _row(out, lineage, model, results, rewards)
        for model in lineage.models
        if (results := read_json(out / model.evaluation / "results.json"))
    ]


def _row(
    out: Path, lineage: Lineage, model: Model, results: Mapping[str, Any], rewards: Mapping[str, Rewards]
) -> dict[str, Any]:
    manifest = read_json(out / model.name / "model/sdzero.json")
    costs = [read_json(out / s / f) for s in model.cost_stages for f in ("statistics.json", "model/sdzero.json")]
    stages = {*model.cost_stages, model.name, model.evaluation}
    return {
        "stage": model.name,
        "label": model.label,
        "starts_from": model.starts_from,
        "accuracy": results["eval/avg_at_k"],
        "accuracy_se": results["eval/avg_at_k_se"],
        **_gain(rewards[model.name], rewards.get(model.starts_from or "", {})),
        **{key.removeprefix("eval/"): value for key, value in results.items() if key.startswith("eval/pass_at")},
        "mean_response_tokens": results["eval/response_tokens"],
        "keyword_rate": results["eval/keywords_per_response"],
        "wrong_to_right": results.get("eval/revise_wrong_to_right"),
        "right_to_wrong": results.get("eval/revise_right_to_wrong"),
        **{key: sum(int(cost.get(key, 0)) for cost in costs) for key in BUDGET},
        "seconds": sum(record["spent"] for name, record in lineage.stages.items() if name in stages),
        # a model that the run did not train is identified by what its evaluation read
        "weights_sha256": manifest.get("weights_sha256")
        or next(iter(lineage.stages.get(model.evaluation, {}).get("inputs", {}).values()), None),
    }


def _gain(rewards: Rewards, before: Rewards) -> dict[str, float | None]:
    """Accuracy minus that of the model it started from, paired by question and averaged over benchmarks, with its
    standard error; None without such an evaluation."""
    if not before:
        return {"accuracy_gain": None, "accuracy_gain_se": None}
    gain, error = average(paired_differences(rewards, before).values())
    return {"accuracy_gain": gain, "accuracy_gain_se": error if math.isfinite(error) else None}


def print_table(summary: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="avg@k on held-out questions, with its standard error over questions")
    for heading in ("model", "accuracy", "gain (paired)", "pass@k", "tokens", "keywords", "wrong→right", "right→wrong"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "model" else "right")
    for row in summary:
        pass_at_k = next(v for k, v in row.items() if k.startswith("pass_at") and not k.endswith("_se"))
        flips = [row["wrong_to_right"], row["right_to_wrong"]]
        table.add_row(
            row["label"],
            f"{row['accuracy']:.3f} ± {_figure(row['accuracy_se'], '.3f')}",
            f"{_figure(row['accuracy_gain'], '+.3f')} ± {_figure(row['accuracy_gain_se'], '.3f')}",
            f"{pass_at_k:.3f}",
            f"{row['mean_response_tokens']:.1f}",
            f"{row['keyword_rate']:.2f}",
            *(_figure(flip, ".0f") for flip in flips),
        )
    Console(width=None if Console().is_terminal else 120).print(table)


def print_evaluation(results: Mapping[str, float | None], rewards: Mapping[str, Sequence[int]]) -> None:
    """The table of one evaluation: a row per benchmark, and their average.

    Args:
        results: metrics as in results.json.
        rewards: of each question's answers, by its id.
    """
    from rich.console import Console
    from rich.table import Table

    k = max(map(len, rewards.values()))
    table = Table(title=f"{k} answers to each question; ± is the standard error over questions")
    table.add_column("benchmark", no_wrap=True)
    for heading in ("questions", f"avg@{k}", f"pass@{k}", "tokens", "truncated", "unparseable", "timeout"):
        table.add_column(heading, no_wrap=True, justify="right")
    counts = Counter(map(benchmark_of, rewards))
    several = len(counts) > 1
    rows = [(name, num, f"eval/{name}/" if several else "eval/") for name, num in counts.items()]
    for name, num_questions, prefix in [*rows, *([("average", len(rewards), "eval/")] if several else [])]:
        table.add_row(
            name,
            str(num_questions),
            f"{_figure(results[f'{prefix}avg_at_k'], '.3f')} ± {_figure(results[f'{prefix}avg_at_k_se'], '.3f')}",
            _figure(results[f"{prefix}pass_at_{k}"], ".3f"),
            _figure(results[f"{prefix}response_tokens"], ".1f"),
            *(_figure(results[f"{prefix}{reason}"], ".3f") for reason in ("truncated", "unparseable", "timeout")),
        )
    Console(width=None if Console().is_terminal else 120).print(table)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
