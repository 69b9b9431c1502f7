"""`sdzero grade`: run a task's verifier on stored responses and print rewards with reasons. Does not import torch."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from sdzero import tasks
from sdzero.tasks.base import Task
from sdzero.tasks.rows import Rows
from sdzero.tasks.sources import read_file
from sdzero.types import Question, Verdict

_COLUMNS = ("response", "answer", "question", "id", "finish_reason", "reward")  # all others are the question's meta


def find_task(name: str) -> type[Task]:
    """Find a task by its class name, ignoring case, or by its class_path.

    Raises:
        ValueError: there is none; lists the known names.
    """
    offered = {n.lower(): getattr(tasks, n) for n in tasks.__all__ if n not in ("Task", "Rows", "Suite")}
    # tasks with built-in rows cannot grade others
    known = {n: t for n, t in offered.items() if not issubclass(t, Rows) or "path" in signature(t).parameters}
    if name.lower() in known:
        return known[name.lower()]
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None) if module else None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"--task {name}: no such task; there are {sorted(known)}, or a class_path such as mine.MyTask")
    return found


def make_task(kind: type[Task], file: Path, options: Sequence[str]) -> Task:
    """Instantiate a task with init_args given as KEY=VALUE; a `Rows` task reads the graded file.

    Raises:
        ValueError: an option is malformed or unknown to the task.
    """
    if wrong := [option for option in options if "=" not in option]:
        raise ValueError(f"--init {wrong[0]}: must be KEY=VALUE")
    given = {key: yaml.safe_load(value) for key, _, value in (option.partition("=") for option in options)}
    if issubclass(kind, Rows):
        given = {"path": str(file), **given}
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"--init: {error}") from None


def grade(task: Task, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a verdict per row: its number, reward, reason and parsed answer.

    A row whose gold answer cannot be graded gets the reward null and a message; a row whose own `reward` differs is
    marked (`disagrees`).

    Raises:
        ValueError: a row has no response.
        GraderError: the machinery failed.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("response"), str):
            raise ValueError(f"row {number} has no string under 'response'; it has {sorted(row)}")
    questions = [_question(number, row) for number, row in enumerate(rows, 1)]
    problems = task.find_ungradable(questions) if isinstance(task, Rows) else {}
    open_ = [i for i, q in enumerate(questions) if q.id not in problems and rows[i].get("finish_reason") != "length"]
    verdicts = dict(zip(open_, task.verify_all([(questions[i], rows[i]["response"]) for i in open_]), strict=True))
    graded = []
    for i, (question, row) in enumerate(zip(questions, rows, strict=True)):
        verdict = verdicts.get(i, Verdict(0, "truncated"))
        row_verdict: dict[str, Any] = {"row": i + 1}
        row_verdict |= {"reward": verdict.reward, "reason": verdict.reason, "parsed": verdict.parsed}
        if question.id in problems:
            row_verdict |= {"reward": None, "reason": "ungradable", "message": problems[question.id]}
        if "reward" in row and row_verdict["reward"] is not None and bool(row["reward"]) != bool(row_verdict["reward"]):
            row_verdict["disagrees"] = True
        graded.append(row_verdict)
    return graded


def summary(graded: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count rows by reason and disagreement, and average the reward of the gradable ones."""
    rewards = [row["reward"] for row in graded if row["reward"] is not None]
    return {
        "rows": len(graded),
        "mean_reward": round(sum(rewards) / len(rewards), 4) if rewards else None,
        "reasons": dict(Counter(row["reason"] for row in graded).most_common()),
        "disagree": sum(row.get("disagrees", False) for row in graded),
    }


def _question(number: int, row: dict[str, Any]) -> Question:
    meta = {column: value for column, value in row.items() if column not in _COLUMNS}
    return Question(f"row {number}", str(row.get("question", "")), str(row.get("answer", "")), meta)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="sdzero grade", description="Grade stored responses; print JSON lines.")
    parser.add_argument(
        "file", type=Path, help="JSONL, JSON or parquet with columns `response`, `answer` and any others of the task"
    )
    parser.add_argument("--task", required=True, metavar="NAME", help="math, countdown, ..., or a class_path")
    parser.add_argument("--init", action="append", default=[], metavar="KEY=VALUE", help="init_arg of the task")
    given = parser.parse_args(arguments)
    rows = read_file(given.file)
    graded = grade(make_task(find_task(given.task), given.file, given.init), rows)
    for row in graded:
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(json.dumps({"summary": summary(graded)}))
