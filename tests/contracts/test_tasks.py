"""What every task promises, checked for every subclass of Task."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sdzero.tasks
from configs.recipes.own_data.verifier import LastDigit
from runs import ROOT
from sdzero.judge.types import CodeVerdict, StdioTest, Submission
from sdzero.tasks import Chains, Code, Countdown, Instructions, Math, MultipleChoice, ReasoningGym, Task
from sdzero.types import Question, Split

SPLITS: tuple[Split, ...] = ("phase1", "phase2", "eval")
JUNK = ("", "A", "\\boxed{}", "\\boxed{", "}{", "?" * 5000, "\\boxed{" * 500, "I do not know.", "\x00", "A\ud800")


def boxed(question: Question) -> str:
    return rf"So the answer is \boxed{{{question.answer}}}."


@dataclass(frozen=True)
class Case:
    """A way to make a task, and a response to a question of it that must count as correct."""

    make: Callable[[], Task]
    canonical: Callable[[Question], str]


@cache
def rows_file(kind: str) -> str:
    """400 made-up rows with the columns that a task reads by default."""
    columns: dict[str, Callable[[int], dict[str, object]]] = {
        "math": lambda n: {"problem": f"What is {n} times x?", "answer": rf"{n}x"},
        "choice": lambda n: {
            "question": f"Which is {n}?",
            "options": [*map(str, range(n, n + 5)), "N/A"],
            "answer": "A",
        },
        "code": lambda n: {"question": f"Write {n}.", "tests": [{"input": "", "output": str(n)}]},
        "instructions": lambda n: {
            "key": n,
            "prompt": f"Say {n} and name a zebra.",
            "instruction_id_list": ["keywords:existence"],
            "kwargs": [{"keywords": ["zebra"]}],
        },
    }
    rows = [{**columns[kind](n), "level": n} for n in range(2, 402)]
    path = Path(mkdtemp(prefix="sdzero-tasks-")) / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class EchoJudge:
    """Holds that a program writes its own text: the real judge has tests of its own."""

    def judge(self, submissions: Sequence[Submission]) -> list[CodeVerdict]:
        right = [StdioTest("", submission.source.strip()) in submission.tests for submission in submissions]
        return [
            CodeVerdict(1, "correct", "echo") if is_right else CodeVerdict(0, "wrong", "echo") for is_right in right
        ]


def code() -> Task:
    with patch("sdzero.tasks.code.Judge", lambda *_: EchoJudge()):
        return Code(rows_file("code"))


CASES = {
    "chains": Case(Chains, lambda question: f"1+1=2A{question.answer}"),
    "code": Case(code, lambda question: f"So:\n```cpp\n{question.meta['level']}\n```"),
    "countdown": Case(Countdown, boxed),
    "reasoning_gym": Case(lambda: ReasoningGym("chain_sum"), boxed),
    "instructions": Case(lambda: Instructions(rows_file("instructions"), "ifeval"), lambda _: "A zebra."),
    "math": Case(lambda: Math(rows_file("math")), boxed),
    "multiple_choice": Case(lambda: MultipleChoice(rows_file("choice")), boxed),
    "rows": Case(
        lambda: LastDigit(str(ROOT / "configs/recipes/own_data/questions.jsonl"), "problem", "gold"),
        lambda question: f"1+1=2A{question.answer}",
    ),
}


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def task(case: Case) -> Task:
    return case.make()


def all_subclasses(base: type) -> set[type]:
    return {found for child in base.__subclasses__() for found in {child, *all_subclasses(child)}}


def test_every_task_has_a_case() -> None:
    for module in pkgutil.iter_modules(sdzero.tasks.__path__):
        importlib.import_module(f"sdzero.tasks.{module.name}")
    ours = {cls for cls in all_subclasses(Task) if cls.__module__.startswith("sdzero.")}
    cases = {base for case in CASES.values() for base in type(case.make()).__mro__}  # Rows has one as a subclass
    assert ours <= cases


def test_every_task_is_exported() -> None:
    ours = {cls.__name__ for cls in all_subclasses(Task) if cls.__module__.startswith("sdzero.")}
    assert ours <= set(sdzero.tasks.__all__)


def test_importing_tasks_imports_nothing_heavy() -> None:
    code = "import sys, sdzero.tasks; print(*{'torch', 'reasoning_gym', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_splits_share_no_id_and_no_text(task: Task) -> None:
    questions = [question for split in SPLITS for question in task.questions(split, 60)]
    assert len(questions) == 180
    assert len({question.id for question in questions}) == 180
    assert len({question.text for question in questions}) == 180


def test_a_longer_list_starts_with_the_shorter(case: Case, task: Task) -> None:
    for split in SPLITS:
        longer = task.questions(split, 50)
        assert case.make().questions(split, 10) == longer[:10]
        assert task.questions(split, 0) == []


def test_ids_name_the_task(task: Task) -> None:
    name = type(task).__name__.lower()
    assert all(name in question.id.replace("_", "") for question in task.questions("eval", 5))


def test_the_gold_answer_is_correct(case: Case, task: Task) -> None:
    for question in task.questions("phase1", 40):
        verdict = task.verify(question, case.canonical(question))
        assert (verdict.reward, verdict.reason) == (1, "correct"), question


def test_a_question_survives_json(case: Case, task: Task) -> None:
    """Traces and rollouts lie in files between the stages."""
    for question in task.questions("phase2", 10):
        again = replace(question, meta=json.loads(json.dumps(dict(question.meta))))
        assert task.verify(again, case.canonical(question)).reward == 1


@pytest.mark.parametrize("junk", JUNK, ids=lambda text: repr(text[:12]))
def test_junk_has_no_reward(task: Task, junk: str) -> None:
    for question in task.questions("eval", 3):
        verdict = task.verify(question, junk)
        assert verdict.reward == 0
        assert verdict.reason in ("wrong", "unparseable")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60) | st.text("0123456789+-*/()=A{}\\ ,.", max_size=60), data=st.data())
def test_any_text_gets_a_verdict(task: Task, text: str, data: st.DataObject) -> None:
    question = data.draw(st.sampled_from(task.questions("eval", 5)))
    for response in (text, f"A{text}", rf"\boxed{{{text}}}"):
        verdict = task.verify(question, response)
        assert verdict.reward == (verdict.reason == "correct")
        assert verdict.reason in ("correct", "wrong", "unparseable")
        assert (verdict.parsed is None) == (verdict.reason == "unparseable")
