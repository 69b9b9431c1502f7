"""`sdzero decontaminate RECIPE_DIR`: overlap of benchmark questions with the questions that a recipe trains on.

It reads only questions, and imports no torch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdzero.tasks.base import Task
from sdzero.types import Question
from sdzero.utils.files import write_text
from sdzero.utils.recipe import Recipe, StageEntry, load_recipe
from sdzero.utils.yaml_config import get_value

N = 13
"""Words of a passage: the largest n of GPT-3's analysis (Brown et al., 2020, appendix C)."""

Texts = Mapping[str, str]
"""Question id -> statement."""


@dataclass(frozen=True)
class Overlap:
    """A benchmark question and a training question that share text.

    Attributes:
        benchmark: id of the benchmark question.
        training: id of the training question.
        exact: they are equal up to case, spaces and punctuation.
        passages: number of distinct passages that both contain.
    """

    benchmark: str
    training: str
    exact: bool
    passages: int


def letters(text: str) -> str:
    """Return a text's letters and digits, case-folded."""
    return "".join(filter(str.isalnum, text.casefold()))


def passages(text: str) -> Iterator[str]:
    """Return every passage of N consecutive words; none for a shorter text."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return (" ".join(words[start : start + N]) for start in range(len(words) - N + 1))


def overlaps(benchmark: Texts, training: Texts) -> list[Overlap]:
    """Find every pair that shares text, in the order of the training questions, in linear time."""
    same: dict[str, list[str]] = {}
    having: dict[str, list[str]] = {}
    for id, text in benchmark.items():
        same.setdefault(letters(text), []).append(id)
        for passage in {*passages(text)}:
            having.setdefault(passage, []).append(id)
    same.pop("", None)  # a text without letters and digits
    found: list[Overlap] = []
    for id, text in training.items():
        exact = same.get(letters(text), ())
        shared = Counter(other for passage in {*passages(text)} for other in having.get(passage, ()))
        found += [Overlap(other, id, other in exact, shared[other]) for other in sorted({*exact, *shared})]
    return found


def report(benchmarks: Mapping[str, Texts], training: Mapping[str, Texts]) -> dict[str, Any]:
    """Count the overlaps by benchmark, for the table and the JSON file.

    Args:
        benchmarks: name -> questions.
        training: phase -> questions.
    """
    everything = {id: text for texts in training.values() for id, text in texts.items()}
    rows: dict[str, Any] = {}
    for name, texts in benchmarks.items():
        pairs = overlaps(texts, everything)
        exact = {pair.benchmark for pair in pairs if pair.exact}
        long = {pair.benchmark for pair in pairs if pair.passages}
        rows[name] = {
            "questions": len(texts),
            "short": sum(not any(passages(text)) for text in texts.values()),
            "exact": len(exact),
            "passages": len(long),
            "overlapping": len(exact | long),
            "share": len(exact | long) / len(texts) if texts else 0.0,
            "pairs": [asdict(pair) for pair in pairs],
        }
    return {"n": N, "training": {phase: len(texts) for phase, texts in training.items()}, "benchmarks": rows}


def read_recipe(recipe: Path) -> tuple[Mapping[str, Texts], Mapping[str, Texts]]:
    """Read the questions that a recipe evaluates, by benchmark, and those that it trains on, by split.

    Raises:
        FileNotFoundError: it is not a recipe, or a stage's file is missing.
        ValueError: a stage names no task.
    """
    loaded = load_recipe(recipe)
    phases: dict[str, dict[str, str]] = {}
    tasks: list[tuple[Any, Task]] = []  # stages that train on one task read it once
    for entry in (entry for entry in loaded.entries if entry.trains):
        data, key = _data(loaded, entry)
        if data.get("num_questions") is None:
            continue  # it trains on the traces of another stage
        task = next((task for config, task in tasks if config == data.get("task")), None) or _task(data, key)
        tasks.append((data.get("task"), task))
        split = data.get("split") or ("phase1" if entry.command == "collect" else "phase2")
        phases.setdefault(split, {}).update(_texts(task, task.ungraded_questions(split, data["num_questions"])))
    data, key = _data(loaded, None)
    held_out = _task(data, key)
    by_benchmark: dict[str, list[Question]] = {}
    for question in held_out.ungraded_questions("eval", get_value(data, "evaluation.num_questions")):
        by_benchmark.setdefault(question.benchmark, []).append(question)
    return {name: _texts(held_out, questions) for name, questions in by_benchmark.items()}, phases


def _data(recipe: Recipe, entry: StageEntry | None) -> tuple[dict[str, Any], str]:
    """Return the keys of the data of a stage, or of the evaluation (None), and the place of its task."""
    values, sources = recipe.compose(entry)
    if entry is not None and entry.command == "collect":
        return values, f"{sources[-1]}: task"
    return get_value(values, "data.init_args") or {}, f"{sources[-1]}: data.init_args.task"


@dataclass
class _Tasks:
    task: Task


def _task(data: Mapping[str, Any], key: str) -> Task:
    """Instantiate a task from the config of its stage.

    Raises:
        ValueError: there is none.
    """
    from jsonargparse import ArgumentParser

    if data.get("task") is None:
        raise ValueError(f"{key} is missing: there are no questions to compare")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(_Tasks, sub_configs=True)
    return parser.instantiate(parser.parse_object({"task": data["task"]})).task


def _texts(task: Task, questions: Sequence[Question]) -> dict[str, str]:
    return {question.id: task.statement(question) for question in questions}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="sdzero decontaminate",
        description="Counts the benchmark questions that share text with a recipe's training questions.",
    )
    parser.add_argument("recipe", type=Path, help="folder with a recipe.yaml")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the counts and all pairs of ids to this file"
    )
    given = parser.parse_args(arguments)
    overlap = report(*read_recipe(given.recipe))
    if given.json:
        write_text(given.json, json.dumps(overlap, indent=1) + "\n")
    print_table(overlap)


def print_table(overlap: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    training = " and ".join(f"{num} of {phase}" for phase, num in overlap["training"].items())
    table = Table(title=f"Overlap with the training questions: {training}")
    table.add_column("benchmark", no_wrap=True)
    for heading in ("questions", "same text", f"{N} words in a row", "either", "share", f"under {N} words"):
        table.add_column(heading, justify="right")
    for name, row in overlap["benchmarks"].items():
        counts = [row[key] for key in ("questions", "exact", "passages", "overlapping")]
        table.add_row(name, *map(str, counts), f"{row['share']:.1%}", str(row["short"]))
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    console.print(f"Questions with under {N} words are compared as a whole only: the same letters and digits.")
