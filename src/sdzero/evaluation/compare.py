"""`sdzero compare RUN RUN ...`: evaluations side by side, with differences paired question by question.

It imports no torch, and starts in a moment.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdzero.evaluation.statistics import Estimate, average, mean_and_error, mean_rewards, paired_differences

MODELS = ("base", "srt", "self_distill")

Rewards = dict[str, list[int]]


@dataclass(frozen=True)
class Figures:
    """One benchmark's figures of one evaluation.

    Attributes:
        questions: how many.
        avg_at_k: mean over questions of the mean reward of their answers, with its standard error.
        difference: mean over questions of that reward minus the first evaluation's, with its standard error; None for
            the first itself.
    """

    questions: int
    avg_at_k: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """One evaluation's figures by benchmark, and averaged: the plain mean over the benchmarks."""

    benchmarks: dict[str, Figures]
    average: Figures


def find(folder: Path) -> dict[str, Rewards]:
    """Name -> rewards by question of the evaluations in a folder: those of the models of `sdzero run`, in order, or
    the only one of a stage's or an evaluation's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    of_models = {str(folder / model): folder / model / "eval/rewards.json" for model in MODELS}
    of_stage = {str(folder): folder / "eval/rewards.json"}
    of_itself = {str(folder): folder / "rewards.json"}
    for files in (of_itself, of_stage, of_models):
        if found := {name: file for name, file in files.items() if file.is_file()}:
            return {name: json.loads(file.read_text()) for name, file in found.items()}
    raise FileNotFoundError(
        f"{folder} has no rewards.json, and is no run with an evaluated model: `sdzero test` and `sdzero run` write one"
    )


def compare(evaluations: Mapping[str, Rewards]) -> dict[str, Comparison]:
    """The figures of each evaluation.

    Args:
        evaluations: name -> question id -> rewards of its answers. All are compared with the first.

    Raises:
        ValueError: two of them were asked different questions.
    """
    baseline, *_ = evaluations
    compared: dict[str, Comparison] = {}
    for name, rewards in evaluations.items():
        _check_questions(baseline, evaluations[baseline], name, rewards)
        differences = {} if name == baseline else paired_differences(rewards, evaluations[baseline])
        figures = {
            benchmark: Figures(len(means), mean_and_error([*means.values()]), differences.get(benchmark))
            for benchmark, means in mean_rewards(rewards).items()
        }
        compared[name] = Comparison(figures, _averaged([*figures.values()]))
    return compared


def _averaged(figures: Sequence[Figures]) -> Figures:
    differences = [f.difference for f in figures if f.difference is not None]
    return Figures(
        sum(f.questions for f in figures),
        average(f.avg_at_k for f in figures),
        average(differences) if differences else None,
    )


def _check_questions(baseline: str, first: Rewards, name: str, rewards: Rewards) -> None:
    only_first, only_this = len(first.keys() - rewards.keys()), len(rewards.keys() - first.keys())
    if only_first or only_this:
        raise ValueError(
            f"{only_this} questions are only in {name} and {only_first} only in {baseline}: "
            "evaluate both on the same questions"
        )


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
    for heading, figures in rows:
        table.add_row(heading, str(figures[0].questions), *map(_cell, figures), end_section=True)
    Console(width=None if Console().is_terminal else 120).print(table)


def _cell(figures: Figures) -> str:
    cell = _plus_minus(figures.avg_at_k, ".3f")
    return cell if figures.difference is None else f"{cell}\n{_plus_minus(figures.difference, '+.3f')}"


def _plus_minus(estimate: Estimate, form: str) -> str:
    value, error = estimate
    return f"{value:{form}} ± {error:.3f}" if math.isfinite(error) else f"{value:{form}} ± -"


def as_json(compared: Mapping[str, Comparison]) -> str:
    """The figures by evaluation; a figure with its error is a list of two, an error that a single question leaves
    undefined null."""

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
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there, too")
    given = parser.parse_args(arguments)
    evaluations: dict[str, Rewards] = {}
    for run in given.runs:
        found = find(run)
        if twice := found.keys() & evaluations.keys():
            raise ValueError(f"{sorted(twice)[0]} is named twice: compare different evaluations")
        evaluations |= found
    compared = compare(evaluations)
    print_table(compared)
    if given.json is not None:
        given.json.write_text(as_json(compared))
