"""Contract of Task, checked for every subclass."""

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
from sdzero.graders.sandbox.types import AssertTest, CodeVerdict, StdioTest, Submission
from sdzero.tasks import (
    AMOBench,
    Chains,
    Champ,
    Code,
    Codeforces,
    Countdown,
    HumanEval,
    Instructions,
    LiveCodeBench,
    Math,
    MultipleChoice,
    OpenR1Math,
    ReasoningGym,
    Suite,
    Task,
)
from sdzero.types import Question, Split
from support.runs import ROOT

SPLITS: tuple[Split, ...] = ("phase1", "phase2", "eval")
JUNK = ("", "A", "\\boxed{}", "\\boxed{", "}{", "?" * 5000, "\\boxed{" * 500, "I do not know.", "\x00", "A\ud800")


def boxed(question: Question) -> str:
    return rf"So the answer is \boxed{{{question.answer}}}."


def in_order(question: Question) -> str:
    """Answer a published row, which has no gold answer; these ones are sums."""
    return rf"\boxed{{{'+'.join(map(str, question.meta['numbers']))}}}"


@dataclass(frozen=True)
class Case:
    """Factory of a task, a correct response to any of its questions, and its splits."""

    make: Callable[[], Task]
    canonical: Callable[[Question], str]
    splits: tuple[Split, ...] = SPLITS


@cache
def rows_file(kind: str) -> str:
    """Write 250 rows with the columns a task reads by default."""
    columns: dict[str, Callable[[int], dict[str, object]]] = {
        "math": lambda n: {"problem": f"What is {n} times x?", "answer": rf"{n}x"},
        "openr1": lambda n: {
            **{"problem": f"What is {n} times x?", "answer": rf"{n}x", "uuid": str(n), "source": "olympiads"},
            **{"question_type": "math-word-problem", "correctness_math_verify": [None, True]},
        },
        "amo": lambda n: {
            **{"question_id": n, "prompt": f"{n} x?", "answer": rf"$\boxed{{{n}x}}$", "answer_type": "variable"}
        },
        "choice": lambda n: {
            **{"question": f"Which is {n}?", "options": [*map(str, range(n, n + 5)), "N/A"], "answer": "A"}
        },
        "countdown": lambda n: {"target": n + 3, "nums": [1, n, 2]},
        "code": lambda n: {"question": f"Write {n}.", "tests": [{"input": "", "output": str(n)}]},
        "codeforces": lambda n: {
            **{"id": f"{n}/A", "contest_id": str(n), "title": "Echo", "description": f"Write {n}.", "rating": n},
            **dict.fromkeys(("aliases", "input_format", "output_format", "interaction_format", "note", "examples")),
            **dict.fromkeys(("time_limit", "memory_limit", "input_mode", "generated_checker", "generated_tests")),
            **{"executable": True, "official_tests_complete": True},
            "official_tests": [{"input": "", "output": str(n)}],
        },
        "livecodebench": lambda n: {
            **{"question_id": str(n), "question_content": f"Write {n}.", "contest_date": "2024-01-01T00:00:00"},
            **{"starter_code": "", "metadata": "{}", "private_test_cases": "[]", "difficulty": str(n)},
            "public_test_cases": json.dumps([{"input": "", "output": str(n), "testtype": "stdin"}]),
        },
        "instructions": lambda n: {
            "key": n,
            "prompt": f"Say {n} and name a zebra.",
            "instruction_id_list": ["keywords:existence"],
            "kwargs": [{"keywords": ["zebra"]}],
        },
    }
    rows = [{**columns[kind](n), "level": n} for n in range(2, 252)]
    path = Path(mkdtemp(prefix="sdzero-tasks-")) / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class EchoSandbox:
    """Sandbox double: a program prints its own last line, and passes assertions if that line says so."""

    def grade(self, submissions: Sequence[Submission]) -> list[CodeVerdict]:
        verdicts = {True: CodeVerdict(1, "correct", "echo"), False: CodeVerdict(0, "wrong", "echo")}
        return [verdicts[self.is_right(submission)] for submission in submissions]

    def is_right(self, submission: Submission) -> bool:
        written = submission.source.strip().rpartition("\n")[2]
        if isinstance(submission.tests[0], AssertTest):
            return written.endswith("# right")
        return StdioTest("", written) in submission.tests


def judged(make: Callable[[], Task]) -> Callable[[], Task]:
    def made() -> Task:
        with patch("sdzero.tasks.code.SandboxClient", lambda *_: EchoSandbox()):
            return make()

    return made


@cache
def three_files(kind: str) -> dict[Split, str]:
    """Divide the rows of `rows_file` between three files."""
    lines = Path(rows_file(kind)).read_text().splitlines(keepends=True)
    files: dict[Split, str] = {}
    for number, split in enumerate(SPLITS):
        path = Path(rows_file(kind)).with_name(f"{split}.jsonl")
        path.write_text("".join(lines[number::3]))
        files[split] = str(path)
    return files


CASES = {
    "amo_bench": Case(lambda: AMOBench(rows_file("amo")), boxed),
    "chains": Case(Chains, lambda question: f"1+1=2A{question.answer}"),
    "champ": Case(Champ, boxed, ("eval",)),
    "code": Case(
        judged(lambda: Code(rows_file("code"))), lambda question: f"So:\n```cpp\n{question.meta['level']}\n```"
    ),
    "codeforces": Case(
        judged(lambda: Codeforces(rows_file("codeforces"), sizes=None)),
        lambda question: f"So:\n```{question.meta['language']}\n{question.meta['rating']}\n```",
    ),
    "countdown": Case(Countdown, boxed),
    "human_eval": Case(
        judged(HumanEval),
        lambda question: f"So:\n```python\ndef {question.meta['entry_point']}(): ...  # right\n```",
        ("eval",),
    ),
    "livecodebench": Case(
        judged(lambda: LiveCodeBench({**three_files("livecodebench")}, version=None)),
        lambda question: f"So:\n```python\n{question.meta['difficulty']}\n```",
    ),
    "openr1_math": Case(lambda: OpenR1Math(rows_file("openr1"), sizes=None), boxed),
    "published_countdown": Case(lambda: Countdown(path=rows_file("countdown")), in_order),
    "reasoning_gym": Case(lambda: ReasoningGym("chain_sum"), boxed),
    "instructions": Case(lambda: Instructions(rows_file("instructions"), "ifeval"), lambda _: "A zebra."),
    "math": Case(lambda: Math(rows_file("math")), boxed),
    "multiple_choice": Case(lambda: MultipleChoice(rows_file("choice")), boxed),
    "rows": Case(
        lambda: LastDigit(str(ROOT / "configs/recipes/own_data/questions.jsonl"), "problem", "gold"),
        lambda question: f"1+1=2A{question.answer}",
    ),
    "suite": Case(
        lambda: Suite({"sums": Countdown(), "maths": Math(rows_file("math"))}, {"sums": 15}), boxed, ("eval",)
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
    code = (
        "import sys, sdzero.tasks; sdzero.tasks.Math('x'); "
        "print(*{'torch', 'reasoning_gym', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_splits_share_no_id_and_no_text(case: Case, task: Task) -> None:
    questions = [question for split in case.splits for question in task.questions(split, 30)]
    assert len(questions) == 30 * len(case.splits)
    assert len({question.id for question in questions}) == len(questions)
    assert len({question.text for question in questions}) == len(questions)


def test_a_longer_list_starts_with_the_shorter(case: Case, task: Task) -> None:
    again = case.make()
    for split in case.splits:
        longer = task.questions(split, 30)
        assert again.questions(split, 10) == longer[:10]
        assert task.questions(split, 0) == []


def test_ids_name_the_task(task: Task) -> None:
    """Metrics are reported by the part of an id before the first slash: of a suite, its benchmarks."""
    is_suite = isinstance(task, Suite)
    found = {question.benchmark.replace("_", "") for question in task.questions("eval", None if is_suite else 30)}
    assert found == ({*task.benchmarks} if is_suite else {type(task).__name__.lower()})


def test_the_gold_answer_is_correct(case: Case, task: Task) -> None:
    questions = task.questions(case.splits[0], 30)
    for verdict in task.verify_all([(question, case.canonical(question)) for question in questions]):
        assert (verdict.reward, verdict.reason) == (1, "correct"), verdict


def test_a_question_survives_json(case: Case, task: Task) -> None:
    """Traces and rollouts are stored as JSON between stages."""
    for question in task.questions(case.splits[-1], 10):
        again = replace(question, meta=json.loads(json.dumps(dict(question.meta))))
        assert task.verify(again, case.canonical(question)).reward == 1


def test_junk_has_no_reward(task: Task) -> None:
    answers = [(question, junk) for question in task.questions("eval", 3) for junk in JUNK]
    for verdict, (_, junk) in zip(task.verify_all(answers), answers, strict=True):
        assert verdict.reward == 0, repr(junk[:12])
        assert verdict.reason in ("wrong", "unparseable"), repr(junk[:12])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60) | st.text("0123456789+-*/()=A{}\\ ,.", max_size=60), data=st.data())
def test_any_text_gets_a_verdict(task: Task, text: str, data: st.DataObject) -> None:
    question = data.draw(st.sampled_from(task.questions("eval", 5)))
    responses = (text, f"A{text}", rf"\boxed{{{text}}}")
    for verdict in task.verify_all([(question, response) for response in responses]):
        assert verdict.reward == (verdict.reason == "correct")
        assert verdict.reason in ("correct", "wrong", "unparseable")
        assert (verdict.parsed is None) == (verdict.reason == "unparseable")
