from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from sdzero.graders.errors import GraderError
from sdzero.graders.worker_pool import Failed, GraderPool
from sdzero.tasks.math import Math
from sdzero.types import Question
from support.rows import jsonl

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


def rows_of(num: int, gold: str = r"\frac{1}{2}") -> list[dict[str, Any]]:
    return [{"problem": f"q{i}", "answer": gold, "level": i} for i in range(num)]


@pytest.fixture(scope="module")
def task() -> Math:
    return Math("unread.jsonl", deadline=1.0)


# --- what a response states -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (r"\boxed{\frac{1}{2}}", "correct"),
        (r"It is \boxed{0.5}.", "correct"),
        (r"First \boxed{7}, no: \boxed{1/2}", "correct"),
        (r"\boxed{1/2} \boxed{7}", "wrong"),
        (r"\boxed{1/2}" "\n" r"\boxed{1/2}", "correct"),  # math-verify would make a set of them
        (r"\boxed{1/2} and an open \boxed{7", "correct"),
        (r"\boxed{\boxed{1/2}}", "correct"),
        (r"\boxed{x = \frac12}", "correct"),
        (r"\boxed{1/2} but the answer is $7$", "correct"),  # only a box states an answer
        (r"\boxed{7} so it is $\frac12$", "wrong"),
        (r"\boxed{1/2} \boxed{}", "unparseable"),
        (r"The answer is 1/2.", "unparseable"),
        (r"$\frac12$", "unparseable"),
        (r"\boxed 1/2", "unparseable"),
        (r"\boxed{" + "1" * 2000 + "}", "unparseable"),
        (r"<think>\boxed{1/2}</think> \boxed{7}", "wrong"),
        (r"<think>\boxed{7}</think> \boxed{1/2}", "correct"),
        (r"\boxed{7}</think> \boxed{1/2}", "correct"),  # a template wrote <think>
        (r"<think>It is \boxed{1/2}</think> Done.", "unparseable"),
        (r"<think>It is \boxed{1/2}", "unparseable"),
        (r"<think>a</think> \boxed{7} <think>\boxed{1/2}", "unparseable"),
        (r"<think>a</think><think>b</think>\boxed{1/2}", "correct"),
        ("", "unparseable"),
    ],
)
def test_verdicts(task: Math, response: str, reason: str) -> None:
    verdict = task.verify(Question("", "", r"\frac{1}{2}"), response)
    assert (verdict.reward, verdict.reason) == (int(reason == "correct"), reason)
    assert (verdict.parsed is None) == (reason == "unparseable")


def test_many_answers_are_graded_as_one_by_one(task: Math) -> None:
    question = Question("", "", r"\frac{x}{2}")
    responses = [rf"\boxed{{{answer}}}" for answer in ("x/2", "x", "0.5x", "2", "?", r"\frac12 x", "9^{9^{9}} x")]
    found = task.verify_all([(question, response) for response in responses])
    expected = ["correct", "wrong", "correct", "wrong", "unparseable", "correct"]
    assert [verdict.reason for verdict in found[:-1]] == expected
    assert found == [task.verify(question, response) for response in responses]
    assert task.verify_all([]) == []


def test_endless_answer_is_a_timeout(task: Math) -> None:
    verdict = task.verify(Question("", "", "x^2"), r"\boxed{(a+b+c+d+e+f)^{40}-(a+b+c+d+e+g)^{40}}")
    assert (verdict.reward, verdict.reason) == (0, "timeout") and verdict.parsed


def test_grader_failure_raises() -> None:
    task = Math("unread.jsonl")
    task._pool = GraderPool[Any, Any](eval, ("1/0", 0))
    with pytest.raises(GraderError):
        task.verify(Question("", "", "x"), r"\boxed{y}")


def test_the_tasks_of_a_process_share_their_workers() -> None:
    assert Math("a.jsonl")._pool is Math("b.jsonl", "question")._pool is not Math("a.jsonl", num_workers=1)._pool


# --- what a row becomes ---------------------------------------------------------------------------


@pytest.mark.parametrize(("instruction", "end"), [({}, f"\n\n{INSTRUCTION}"), ({"instruction": ""}, "")])
def test_the_instruction_follows_the_question(tmp_path: Path, instruction: dict[str, Any], end: str) -> None:
    task = Math(jsonl(tmp_path / "q.jsonl", rows_of(30)), **instruction)
    assert [question.text for _, question in task._all] == [f"q{i}{end}" for i in range(30)]


def test_a_questions_split_and_id_do_not_depend_on_the_instruction(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", rows_of(30))
    first, other = Math(path)._all, Math(path, instruction="Be brief.")._all
    assert [(split, question.id) for split, question in first] == [(split, question.id) for split, question in other]


def test_rows_whose_gold_answer_cannot_be_graded_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(60)
    rows[3]["answer"], rows[30]["answer"], rows[40]["answer"] = "proof", "100 (i.e., all values)", r"\text{yes}"
    task = Math(jsonl(tmp_path / "q.jsonl", rows))
    with caplog.at_level(logging.WARNING):
        kept = [question for _, question in task._all]
    assert len(kept) == 58 and {q.answer for q in kept} == {r"\frac{1}{2}", r"\text{yes}"}
    assert [(where.rpartition(": ")[2], reason) for where, reason in task.dropped] == [
        ("row 4", "gold answer 'proof': it is 'proof'"),
        ("row 31", "gold answer '100 (i.e., all values)': math-verify cannot parse it"),
    ]
    assert "left out 2 of 60 questions" in caplog.text and "gold answer 'proof'" in caplog.text


def test_too_many_such_rows_are_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", [*rows_of(18), *({"problem": f"p{i}", "answer": "proof"} for i in range(2))])
    with pytest.raises(ValueError, match=r"2 of 20 questions.*gold answer 'proof'.*task.max_dropped_share=0.05"):
        Math(path).questions("eval", 1)
    assert Math(path, max_dropped_share=0.1).questions("eval", 1)


def test_endless_gold_answer_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*rows_of(3), {"problem": "p", "answer": "x+1"}]
    task = Math(jsonl(tmp_path / "q.jsonl", rows), max_dropped_share=0.5)
    outcomes = lambda items: [Failed("timeout") if gold == "x+1" else None for _, gold in items]  # noqa: E731
    monkeypatch.setattr(task._pool, "map", outcomes)
    assert len(task._all) == 3
    assert [reason for _, reason in task.dropped] == ["gold answer 'x+1': grading it ends in timeout"]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ModuleNotFoundError, match=r'math-verify: pip install "sdzero\[math\]"'):
        Math("unread.jsonl")
