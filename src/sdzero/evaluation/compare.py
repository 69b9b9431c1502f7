"""`sdzero compare RUN RUN ...`: evaluations side by side, with differences paired by question.

It imports no torch, so that it starts quickly.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdzero.evaluation.statistics import Estimate, Rewards, average, mean_and_error, mean_rewards, paired_differences
from sdzero.utils.files import write_text
from sdzero.utils.lineage import read_lineage


@dataclass(frozen=True)
class Metrics:
    """Metrics of one evaluation on one benchmark.

    Attributes:
        questions: number of questions.
        avg_at_k: mean over questions of the mean reward of their answers, with its standard error.
        difference: mean over questions of that reward minus the first evaluation's, with its standard error; None for
            the first evaluation.
    """

    questions: int
    avg_at_k: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """Metrics of one evaluation by benchmark, and their plain mean over the benchmarks."""

    benchmarks: dict[str, Metrics]
    average: Metrics


def find_evaluations(folder: Path) -> dict[str, Rewards]:
    """Read the evaluations of a run, in the order of its models, or the only one of a stage's or evaluation's folder.

    Returns:
        Name -> question id -> rewards of its answers.

    Raises:
        FileNotFoundError: the folder holds no evaluation.
        ValueError: lineage.json is damaged or of an older layout.
    """
    for name in ("rewards.json", "eval/rewards.json"):
        if (folder / name).is_file():
            return {str(folder): json.loads((folder / name).read_text())}
    files = {model.name: folder / model.evaluation / "rewards.json" for model in read_lineage(folder).models}
    found = {str(folder / name): json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    if not found:
        raise FileNotFoundError(
            f"{folder} has no rewards.json and is not a run with an evaluated model: `sdzero test` and `sdzero run` "
            "write one"
        )
    return found


def compare(evaluations: Mapping[str, Rewards]) -> dict[str, Comparison]:
    """Compute avg@k of each evaluation, and its paired difference to the first.

    Args:
        evaluations: name -> question id -> rewards of its answers.

    Raises:
        ValueError: two of them answered different questions.
    """
    baseline, *_ = evaluations
    compared: dict[str, Comparison] = {}
    for name, rewards in evaluations.items():
        is_baseline = name == baseline
        differences = {} if is_baseline else paired_differences(rewards, evaluations[baseline], (name, baseline))
        metrics = {
            benchmark: Metrics(len(means), mean_and_error([*means.values()]), differences.get(benchmark))
            for benchmark, means in mean_rewards(rewards).items()
        }
        of_average = Metrics(
            len(rewards),
            average(m.avg_at_k for m in metrics.values()),
            None if is_baseline else average(differences.values()),
        )
        compared[name] = Comparison(metrics, of_average)
    return compared


def print_table(compared: Mapping[str, Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    baseline, *_ = compared
    table = Table(title=f"avg@k, and the difference to {baseline} paired by question, with standard errors")
    table.add_column("benchmark", no_wrap=True)
    table.add_column("questions", justify="right")
    for name in compared:
        table.add_column(name, justify="right", overflow="fold")
    benchmarks = compared[baseline].benchmarks
    rows = [(benchmark, [c.benchmarks[benchmark] for c in compared.values()]) for benchmark in benchmarks]
    if len(rows) > 1:
        rows.append(("average", [c.average for c in compared.values()]))
    for heading, cells in rows:
        table.add_row(heading, str(cells[0].questions), *map(_cell, cells), end_section=True)
    Console(width=None if Console().is_terminal else 120).print(table)


def _cell(metrics: Metrics) -> str:
    cell = _plus_minus(metrics.avg_at_k, ".3f")
    return cell if metrics.difference is None else f"{cell}\n{_plus_minus(metrics.difference, '+.3f')}"


def _plus_minus(estimate: Estimate, form: str) -> str:
    value, error = estimate
    return f"{value:{form}} ± {error:.3f}" if math.isfinite(error) else f"{value:{form}} ± -"


def as_json(compared: Mapping[str, Comparison]) -> str:
    """Serialize the metrics by evaluation: an estimate is [value, standard error], an undefined error null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return None if value is not None and not math.isfinite(value) else value

    return json.dumps({name: plain(asdict(c)) for name, c in compared.items()}, indent=2, allow_nan=False) + "\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="sdzero compare", description="avg@k of evaluations, and paired differences to the first one."
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of `sdzero run`, of a stage, or of an evaluation"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics to this file")
    given = parser.parse_args(arguments)
    evaluations: dict[str, Rewards] = {}
    for run in given.runs:
        found = find_evaluations(run)
        if twice := found.keys() & evaluations.keys():
            raise ValueError(f"{sorted(twice)[0]} is named twice: compare different evaluations")
        evaluations |= found
    compared = compare(evaluations)
    print_table(compared)
    if given.json is not None:
        write_text(given.json, as_json(compared))
