from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from sdzero.graders.errors import GraderError
from sdzero.graders.sandbox.types import (
    AssertTest,
    CallTest,
    Checker,
    Language,
    Limits,
    StdioTest,
    Submission,
)
from sdzero.tasks import Code
from sdzero.tasks import code as module
from sdzero.tasks.hub import HubDataset
from sdzero.types import Question
from support.fake_sandbox import FakeSandbox
from support.fake_sandbox import fake_sandbox as fake_sandbox  # a fixture
from support.fixtures import programs
from support.fixtures.make import make
from support.rows import from_config, jsonl

TESTS = [{"input": "1", "output": "2"}]


pytestmark = pytest.mark.usefixtures("fake_sandbox")


def sandbox(task: Code) -> FakeSandbox:
    assert isinstance(task._sandbox, FakeSandbox)
    return task._sandbox


def rows_of(num: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "tests": TESTS, **columns} for i in range(num)]


def submission(path: Path, language: Language = "cpp", row: dict[str, Any] | None = None, **options: Any) -> Submission:
    """Return the submission built for a response to the single row."""
    rows = [{"question": "q", "tests": TESTS, **(row or {})}]
    task = Code(jsonl(path / "q.jsonl", rows), language=language, **options)
    [(_, question)] = task._all
    task.verify(question, f"```{language}\nwrong\n```")
    [[found]] = sandbox(task).asked
    return found


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("<think>```cpp\nwrong\n```</think>\n```cpp\ncorrect\n```", "correct"),
        ("```cpp\nwrong\n```</think>\n```cpp\ncorrect\n```", "correct"),  # a template wrote <think>
        ("<think>\n```cpp\ncorrect\n```", "unparseable"),
        ("<think>\n```cpp\ncorrect\n```\n</think>", "unparseable"),
        ("```cpp\ncorrect\n```\n<think>hm", "unparseable"),
        ("no program", "unparseable"),
        *((f"```cpp\n{reason}\n```", reason) for reason in ("wrong", "timeout", "memory", "compile_error")),
    ],
)
def test_verdicts(tmp_path: Path, response: str, reason: str) -> None:
    task = Code(jsonl(tmp_path / "q.jsonl", rows_of(1)))
    [(_, question)] = task._all
    verdict = task.verify(question, response)
    assert (verdict.reward, verdict.reason) == (int(reason == "correct"), reason)
    assert verdict.parsed == (None if reason == "unparseable" else f"{reason}\n")


def test_many_answers_are_one_request(tmp_path: Path) -> None:
    task = Code(jsonl(tmp_path / "q.jsonl", rows_of(3)), backend="nsjail", num_workers=3, python="/usr/bin/python3")
    assert sandbox(task).args == ("nsjail", 3, "/usr/bin/python3")
    questions, words = [question for _, question in task._all], ("correct", "wrong", "timeout", "correct")
    answers = [(questions[i % 3], f"```\n{word}\n```") for i, word in enumerate(words)]
    answers.insert(1, (questions[0], "none"))
    reasons = [verdict.reason for verdict in task.verify_all(answers)]
    assert reasons == ["correct", "unparseable", "wrong", "timeout", "correct"]
    [asked] = sandbox(task).asked
    assert [s.source for s in asked] == ["correct\n", "wrong\n", "timeout\n", "correct\n"]
    assert asked[0].tests is asked[3].tests  # sent once
    assert task.verify_all([(questions[0], "none")])[0].reason == "unparseable"
    assert len(sandbox(task).asked) == 1


def test_requests_are_limited_in_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_REQUEST", 10)
    rows = [{"question": f"q{i}", "tests": [{"input": "1" * i, "output": "2" * i}]} for i in range(1, 6)]
    task = Code(jsonl(tmp_path / "q.jsonl", rows))
    questions = [question for _, question in task._all]
    words = ["correct", "wrong", "timeout"]
    answers = [(question, f"```\n{word}\n```") for question in questions for word in words]
    answers[4] = (questions[1], "none")
    reasons = [verdict.reason for verdict in task.verify_all(answers)]
    assert reasons == [*words, "correct", "unparseable", "timeout", *words * 3]
    sizes = [[len(submission.tests[0].input) for submission in asked] for asked in sandbox(task).asked]  # pyright: ignore[reportAttributeAccessIssue]
    assert sizes == [[1, 1, 1, 2, 2, 3, 3, 3], [4, 4, 4, 5, 5, 5]]


def test_sandbox_failure_raises(tmp_path: Path) -> None:
    task = Code(jsonl(tmp_path / "q.jsonl", rows_of(1)))
    with pytest.raises(GraderError, match="the sandbox broke"):
        task.verify(task._all[0][1], "```\nfault\n```")
    with pytest.raises(ValueError, match=r"q.jsonl has no tests for question code/other"):
        task.verify(Question("code/other", "", ""), "```\ncorrect\n```")


# --- what a row becomes ---------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("cell", "tests"),
    [
        (TESTS * 2, (StdioTest("1", "2"),) * 2),
        ([{"call": "f", "args": [1.5, [None]], "expected": {"a": 1}}], (CallTest("f", (1.5, [None]), {"a": 1}),)),
        ([{"program": "assert f(1) == 2"}], (AssertTest("assert f(1) == 2"),)),
    ],
)
def test_kinds_of_tests(tmp_path: Path, cell: Any, tests: Any, as_text: bool) -> None:
    row = {"tests": json.dumps(cell) if as_text else cell}
    found = submission(tmp_path, "python", row, allow_assertions=True)
    assert (found.tests, found.language) == (tests, "python")
    assert (found.limits, found.compare, found.checker, found.files) == (Limits(), "tokens", None, None)


def test_columns_of_codeforces(tmp_path: Path) -> None:
    row = {"time_limit": 2.5, "memory_limit": 64, "generated_checker": "print(1)", "input_mode": "file"}
    found = submission(tmp_path, row=row, limits=Limits(time=6, processes=3), compare="lines")
    assert found.limits == Limits(time=2.5, memory_mb=64, processes=3)
    assert found.checker == Checker("python", "print(1)")
    assert (found.files, found.compare) == (("input.txt", "output.txt"), "lines")
    empty = {"time_limit": None, "memory_limit": float("nan"), "generated_checker": "", "input_mode": "stdio"}
    found = submission(tmp_path, row=empty, limits=Limits(time=6))
    assert (found.limits, found.checker, found.files) == (Limits(time=6), None, None)


def test_a_rows_own_language(tmp_path: Path) -> None:
    rows = rows_of(3)
    rows[0]["language"], rows[1]["language"] = "python", None
    task = Code(jsonl(tmp_path / "q.jsonl", rows))
    one, other, third = (question for _, question in task._all)
    assert "in Python 3, in one block fenced by ```python and ```." in one.text
    assert "in C++17" in other.text and "in C++17" in third.text
    response = "```python\ncorrect\n```\n```cpp\nwrong\n```"
    assert [task.verify(question, response).reason for question in (one, other)] == ["correct", "wrong"]
    assert [asked[0].language for asked in sandbox(task).asked] == ["python", "cpp"]


def test_published_prompts_of_codeforces(tmp_path: Path) -> None:
    """Reads a configuration with a row per language without the data set's own task: no generated tests."""
    source = HubDataset(str(make(tmp_path, programs.CODEFORCES)), config="verifiable-prompts")
    task = Code(source, "official_tests", question_column="prompt", max_dropped_share=0.2)
    lacking = {"902/B", "42/A"}
    rows = [row for row in [*map(programs.problem, range(24)), *programs.odd_problems()] if programs.is_verifiable(row)]
    expected = [(language, row) for language in ("cpp", "python") for row in rows if row["id"] not in lacking]
    for (_, question), (language, row) in zip(task._all, expected, strict=True):
        assert (question.meta["id"], question.meta["language"]) == (row["id"], language)
        submission = task._submissions[question.id]
        assert submission.tests == tuple(StdioTest(**test) for test in row["official_tests"])
        assert (submission.language, submission.limits.time) == (language, row["time_limit"])
    incomplete = "its official_tests are incomplete or cut: official_tests_complete is false"
    assert [why for _, why in task.dropped] == [incomplete] * 2 * len(lacking)


def test_interactive_problems_are_set_aside(tmp_path: Path) -> None:
    rows = rows_of(6, interaction_format=None)
    rows[2]["interaction_format"] = "You ask, it answers."
    rows[3]["interaction_format"] = " "
    task = Code(jsonl(tmp_path / "q.jsonl", rows))
    assert [q.text.split()[0] for _, q in task._all] == ["q0", "q1", "q3", "q4", "q5"]
    assert dict(task.set_aside) == {"the problem is interactive": 1} and task.dropped == []


def test_prompt_text(tmp_path: Path) -> None:
    row = {"question": "Add.", "time_limit": 2.0, "memory_limit": 256.0, "input_mode": "file", "tests": TESTS}
    assert Code(jsonl(tmp_path / "q.jsonl", [row]))._all[0][1].text == (
        "Add.\n\n"
        "Time limit per test: 2 s. Memory limit: 256 MB.\n\n"
        "The program reads its input from input.txt and writes its output to output.txt.\n\n"
        "Write the whole program in C++17, in one block fenced by ```cpp and ```."
    )
    plain = Code(jsonl(tmp_path / "q.jsonl", rows_of(1)), language="python")._all[0][1]
    assert plain.text == (
        "q0\n\nTime limit per test: 10 s. Memory limit: 512 MB.\n\n"
        "Write the whole program in Python 3, in one block fenced by ```python and ```."
    )


def test_a_questions_split_and_id_depend_on_its_statement_alone(tmp_path: Path) -> None:
    """A question used in training in one language is not held out in the other."""
    path = jsonl(tmp_path / "q.jsonl", rows_of(40))
    one, other = Code(path, language="cpp"), Code(path, language="python", limits=Limits(time=1))
    assert [(split, q.id) for split, q in one._all] == [(split, q.id) for split, q in other._all]
    assert len({split for split, _ in one._all}) == 3


def test_meta_holds_no_tests(tmp_path: Path) -> None:
    rows = rows_of(3, generated_checker="print(1)", rating=800, time_limit=1)
    task = Code(jsonl(tmp_path / "q.jsonl", rows))
    assert [dict(q.meta) for _, q in task._all] == [{"rating": 800, "time_limit": 1}] * 3
    assert task._rows == {}  # what was read is not held twice


# --- rows without tests that can be run -----------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        *(({"tests": empty}, "it has no tests") for empty in (None, [], " ", "[]")),
        ({"tests": "[{"}, "its tests are not valid JSON: Expecting property name"),
        ({"tests": "[" * 100_000}, "its tests are not valid JSON: maximum recursion depth"),
        ({"tests": {"input": ["1"], "output": ["2"]}}, "its tests are not a list of objects"),
        ({"tests": ["1"]}, "its tests are not a list of objects"),
        ({"tests": [*TESTS, {"input": "1"}]}, r"test 2: a test is .*this one has \['input'\]"),
        ({"tests": [{"input": 1, "output": "2"}]}, "test 1: 'input' is not a string"),
        ({"tests": [{"input": "1", "output": None}]}, "test 1: 'output' is not a string"),
        ({"tests": [{"call": "f", "args": "ab", "expected": 1}]}, "test 1: 'args' is not a list"),
        ({"tests": [{"call": None, "args": [], "expected": 1}]}, "test 1: 'call' is not a string"),
        ({"tests": [{"program": ["assert 1"]}]}, "test 1: 'program' is not a string"),
        ({"tests": [*TESTS, {"program": "1"}]}, "a submission needs tests of one kind"),
        ({"tests": [{"program": "1"}]}, "AssertTest is for python only"),
        ({"time_limit": "2 seconds"}, "time_limit is '2 seconds': it must be a number"),
        ({"memory_limit": True}, "memory_limit is True: it must be a number"),
        ({"time_limit": 0}, "limits.time must be above 0, got 0"),
        ({"language": "rust"}, r"language is 'rust': it must be one of \['cpp', 'python'\]"),
        ({"input_mode": "interactive"}, "input_mode is 'interactive': it must be stdio or file"),
    ],
)
def test_rows_that_cannot_be_judged_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, Any], reason: str
) -> None:
    rows = rows_of(21)
    rows[4] |= row
    path = jsonl(tmp_path / "q.jsonl", rows)
    task = Code(path)
    with caplog.at_level(logging.WARNING):
        assert [q.text.split()[0] for _, q in task._all] == [f"q{i}" for i in range(21) if i != 4]
    [(where, why)] = task.dropped
    assert where == f"{path}: row 5"
    assert re.match(reason, why)
    assert "left out 1 of 21 questions" in caplog.text and why in caplog.text


def test_a_file_without_tests_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", rows_of(5))
    with pytest.raises(ValueError, match=r"5 of 5 questions that cannot be graded.* it has no column 'official_tests'"):
        Code(path, tests_column="official_tests").questions("eval", 1)
    with pytest.raises(ValueError, match="task.language must be one of .*got 'rust'"):
        Code(path, language="rust")  # pyright: ignore[reportArgumentType]


def test_training_on_assertions_needs_permission(tmp_path: Path) -> None:
    asserted = jsonl(tmp_path / "q.jsonl", rows_of(40, tests=[{"program": "assert f(1) == 2"}]))
    called = jsonl(tmp_path / "c.jsonl", rows_of(40, tests=[{"call": "f", "args": [1], "expected": 2}]))
    task = Code(asserted, language="python")
    assert len(task.questions("eval", 3)) == 3
    for split in ("phase1", "phase2"):
        with pytest.raises(ValueError, match=f"3 questions of split '{split}' .*by assertions.*task.allow_assertions"):
            task.questions(split, 3)
        assert len(Code(asserted, language="python", allow_assertions=True).questions(split, 3)) == 3
        assert len(Code(called, language="python").questions(split, 3)) == 3


def test_in_a_config(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", rows_of(9))
    task = from_config("sdzero.tasks.Code", path=path, language="python", limits={"time": 6}, compare="lines")
    assert (task.limits, task.compare, task.language) == (Limits(time=6), "lines", "python")
