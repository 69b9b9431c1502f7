"""The figures of a run: one row per model, from the evaluations, the exports and collect's statistics; and those of one
evaluation: one row per benchmark."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdzero.evaluation.statistics import average, paired_differences
from sdzero.types import benchmark_of

BUDGET = ("num_generations", "num_tokens_sampled", "num_tokens_trained")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def summarize(out: Path, lineage: dict[str, Any]) -> list[dict[str, Any]]:
    """One object per evaluated model: base, srt, self_distill. A model that is not evaluated (yet) has none.

    Budgets are what training the model cost (table 3): collect's belong to srt, the base's are 0;
    evaluation's generations are not in them.
    """
    rows: list[dict[str, Any]] = []
    rewards: dict[str, list[int]] = {}
    for name, stages in {"base": [], "srt": ["collect", "srt"], "self_distill": ["self_distill"]}.items():
        results = _read(out / name / "eval/results.json")
        if not results:
            continue
        manifest = _read(out / name / "model/sdzero.json")
        before, rewards = rewards, _read(out / name / "eval/rewards.json")
        costs = [_read(out / s / file) for s in stages for file in ("statistics.json", "model/sdzero.json")]
        rows.append(
            {
                "stage": name,
                "accuracy": results["eval/avg_at_k"],
                "accuracy_se": results["eval/avg_at_k_se"],
                **_gain(rewards, before),
                **{
                    key.removeprefix("eval/"): value for key, value in results.items() if key.startswith("eval/pass_at")
                },
                "mean_response_tokens": results["eval/response_tokens"],
                "keyword_rate": results["eval/keywords_per_response"],
                "wrong_to_right": results.get("eval/revise_wrong_to_right"),
                "right_to_wrong": results.get("eval/revise_right_to_wrong"),
                **{key: sum(int(cost.get(key, 0)) for cost in costs) for key in BUDGET},
                "seconds": sum(r["spent"] for s, r in lineage.items() if s in (*stages, name, f"{name}/eval")),
                # a base that the run did not train is known by what its evaluation read
                "weights_sha256": manifest.get("weights_sha256")
                or next(iter(lineage.get(f"{name}/eval", {}).get("inputs", {}).values()), None),
            }
        )
    return rows


def _gain(rewards: dict[str, list[int]], before: dict[str, list[int]]) -> dict[str, float | None]:
    """Accuracy over the model before, paired by question and averaged over benchmarks, with its standard error; None
    for the first."""
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
            row["stage"],
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
        results: figures as results.json has them.
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
