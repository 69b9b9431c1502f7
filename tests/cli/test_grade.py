"""`sdzero grade`: verdicts on stored responses, and their summary."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdzero.cli import grade
from sdzero.tasks import Countdown, Math, Task
from sdzero.types import Question, Split, Verdict


class Echo(Task):
    """Right if the response is the answer."""

    def questions(self, split: Split, num_questions: int) -> list[Question]:
        return []

    def verify(self, question: Question, response: str) -> Verdict:
        return Verdict(1, "correct", response) if response == question.answer else Verdict(0, "wrong", response)


ROWS = [
    {"response": r"\boxed{\frac12}", "answer": "0.5", "reward": 0},
    {"response": r"\boxed{3}", "answer": "4", "reward": 0},
    {"response": "nothing", "answer": "4"},
    {"response": r"\boxed{3}", "answer": "3", "finish_reason": "length"},
    {"response": r"\boxed{3}", "answer": "proof", "reward": 1},
]


def test_every_row_and_the_summary(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    options = ["--task", "math", tmp_path / "rows.jsonl", "--init", "num_workers=1"]
    argv = [sys.executable, "-m", "sdzero", "grade", *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    *rows, last = map(json.loads, done.stdout.splitlines())
    assert [(row["row"], row["reward"], row["reason"]) for row in rows] == [
        (1, 1, "correct"),
        (2, 0, "wrong"),
        (3, 0, "unparseable"),
        (4, 0, "truncated"),
        (5, None, "ungradable"),
    ]
    assert [row.get("disagrees", False) for row in rows] == [True, False, False, False, False]
    assert last["summary"] == {
        "rows": 5,
        "mean_reward": 0.25,
        "reasons": {"correct": 1, "wrong": 1, "unparseable": 1, "truncated": 1, "ungradable": 1},
        "disagree": 1,
    }


def test_a_task_by_name_or_class_path() -> None:
    assert grade.find_task("Math") is grade.find_task("math") is grade.find_task("sdzero.tasks.Math") is Math
    assert grade.find_task(f"{__name__}.Echo") is Echo
    for name in ("no", "sdzero.tasks.no", "sdzero.types.Question"):
        with pytest.raises(ValueError, match=r"no such task; there are \['amobench', 'chains', 'code', "):
            grade.find_task(name)


def test_the_columns_that_a_task_needs_are_its_meta() -> None:
    rows = [{"response": rf"\boxed{{{text}}}", "numbers": [2, 3, 4], "target": 24} for text in ("2*3*4", "4*3")]
    assert [row["reason"] for row in grade.grade(Countdown(), rows)] == ["correct", "wrong"]


def test_invalid_arguments_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 2 has no string under 'response'; it has \\['answer'\\]"):
        grade.grade(Echo(), [{"response": "a", "answer": "a"}, {"answer": "b"}])
    with pytest.raises(ValueError, match="must be KEY=VALUE"):
        grade.make_task(Countdown, tmp_path, ["seed"])
    with pytest.raises(ValueError, match="unexpected keyword argument 'sed'"):
        grade.make_task(Countdown, tmp_path, ["sed=1"])
    made = grade.make_task(Countdown, tmp_path, ["seed=7", "max_value=50"])
    assert isinstance(made, Countdown) and (made.seed, made.max_value) == (7, 50)
