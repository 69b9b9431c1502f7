"""The program data sets with a real sandbox: right and wrong programs get the rewards they should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdzero.tasks import Code, Codeforces, HumanEval, LiveCodeBench
from sdzero.tasks.hub import HubDataset
from sdzero.types import Question
from support.fixtures import livecodebench, programs
from support.fixtures.make import make

pytestmark = pytest.mark.sandbox

IN_FILES = "import sys\nsys.stdin, sys.stdout = open('input.txt'), open('output.txt', 'w')\n"
EXCEPTIONS: dict[str, str] = {}
"""HumanEval's questions whose broken answers pass nevertheless, with why: there are none."""


def fenced(source: str, name: str = "python") -> str:
    return f"So this:\n```{name}\n{source}\n```\n"


@pytest.fixture(scope="module")
def human_eval() -> Iterator[HumanEval]:
    task = HumanEval()
    yield task
    task._sandbox.close()


def reasons(task: Code, answers: list[tuple[Question, str]]) -> dict[str, str]:
    return {q.id: v.reason for (q, _), v in zip(answers, task.verify_all(answers), strict=True)}


def test_canonical_solutions_of_human_eval_are_right(human_eval: HumanEval) -> None:
    questions = human_eval.questions("eval", None)
    answers = [(q, fenced(f"{human_eval.statement(q)}\n{q.meta['solution']}")) for q in questions]
    found = reasons(human_eval, answers)
    assert len(found) == 164
    assert {id: reason for id, reason in found.items() if reason != "correct"} == {}


def test_broken_solutions_of_human_eval_are_wrong(human_eval: HumanEval) -> None:
    """Each is the canonical solution with its result wrapped in a list: only the value is wrong."""
    broken = "{prompt}\n{solution}\n\n_right = {name}\n\ndef {name}(*arguments):\n    return [_right(*arguments)]\n"
    questions = human_eval.questions("eval", None)
    answers = []
    for q in questions:
        parts = {"prompt": human_eval.statement(q), "solution": q.meta["solution"], "name": q.meta["entry_point"]}
        answers.append((q, fenced(broken.format(**parts))))
    found = reasons(human_eval, answers)
    assert len(found) == 164
    assert {id for id, reason in found.items() if reason == "correct"} == {*EXCEPTIONS}
    assert {*found.values()} <= {"correct", "runtime_error"}, "the assertions fail, and nothing else"


def test_codeforces(tmp_path: Path) -> None:
    folder = make(tmp_path, programs.CODEFORCES)
    task = Codeforces(HubDataset(str(folder), config="verifiable"), sizes=None)
    questions = {q.id.removeprefix("codeforces/"): q for _, q in task._all}
    sums, products = programs.program(0, "python"), programs.program(1, "python")
    wrong_later = "a, b = map(int, input().split())\nprint(a + b if a < 100 else 0)"
    expected = [
        ("800/A/python", sums, "correct"),
        ("800/A/python", products, "wrong"),
        ("800/A/python", wrong_later, "wrong"),  # in the last of the tests
        ("801/A/python", products, "correct"),
        ("801/A/cpp", programs.program(1, "cpp"), "correct"),
        ("801/A/cpp", programs.program(0, "cpp"), "wrong"),
        ("801/A/cpp", "int main() { nonsense }", "compile_error"),
        ("801/A/cpp", products, "unparseable"),  # in the other language
        ("901/A/python", sums, "correct"),  # ends of lines
        (
            "901/A/python",
            "a, b = open(0, newline='').read().split(' ')\nassert b[-2:] == '5\\n'\nprint(int(a) + 5)",
            "correct",
        ),
        ("902/B/python", sums, "correct"),  # tests in a file
        ("902/B/python", "a, b = map(int, input().split())\nprint({1: 4}.get(a, a + b))", "correct"),  # cut test unused
        ("902/B/python", products, "wrong"),
        ("42/A/cpp", programs.program(0, "cpp"), "correct"),
        ("905/A/python", IN_FILES + sums, "correct"),
        ("905/A/python", sums, "runtime_error"),  # it reads nothing
        ("906/E/python", "print(int(input()) - 7, 7)", "correct"),  # another right output
        ("906/E/python", "print(int(input()) - 7, 8)", "wrong"),
        ("914/A/python", "while True: pass", "timeout"),
    ]
    answers = [
        (questions[id], fenced(source, "cpp" if "int main" in source else "python")) for id, source, _ in expected
    ]
    found = task.verify_all(answers)
    assert [(id, v.reason) for (id, _, _), v in zip(expected, found, strict=True)] == [(id, r) for id, _, r in expected]


def test_livecodebench(tmp_path: Path) -> None:
    folder = make(tmp_path, livecodebench.LIVECODEBENCH)
    task = LiveCodeBench(HubDataset(str(folder)), "v1")
    questions = task.questions("eval", None)
    right = [(q, fenced(livecodebench.solution(number))) for number, q in enumerate(questions)]
    wrong = [(q, fenced(livecodebench.solution(5 - number))) for number, q in enumerate(questions)]
    assert [verdict.reason for verdict in task.verify_all(right)] == ["correct"] * len(questions)
    assert [verdict.reward for verdict in task.verify_all(wrong)] == [0] * len(questions)
    functions = [
        (
            questions[3],
            "class Solution:\n    def half(self, a: Optional[int]):\n        return a / 2 + 1e-9",
            "correct",
        ),
        (questions[3], "def half(a: int) -> float:\n    return a // 2", "wrong"),
        (questions[1], "class Solution:\n    def total(self, n, m):\n        return reduce(add, n, m)", "correct"),
        (questions[0], "print(reduce(add, map(int, input().split())))", "correct"),  # names that the preamble brings
    ]
    found = task.verify_all([(q, fenced(source)) for q, source, _ in functions])
    assert [verdict.reason for verdict in found] == [reason for *_, reason in functions]
