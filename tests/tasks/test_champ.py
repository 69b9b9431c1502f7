"""CHAMP's real rows, from the package champ-dataset."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from sdzero.tasks import Champ
from sdzero.tasks.champ import FILE, parse_gold
from sdzero.tasks.hub import Row
from sdzero.tasks.rows import SetAside

SENTENCE = "its answer is a sentence, which needs a judge model"
# rows, by their number, whose gold answer the grader cannot read, and why
UNREADABLE = {172: "two pairs of values with ± in factors", 216: "a product with dots in its middle"}


@pytest.fixture(scope="module")
def task() -> Champ:
    return Champ()


@pytest.fixture(scope="module")
def published(task: Champ) -> list[Row]:
    return task.load_rows(FILE, [])


def test_its_own_answers_are_right(task: Champ, published: list[Row]) -> None:
    questions = task.questions("eval", None)
    verdicts = task.verify_all([(q, rf"So it is \boxed{{{q.answer}}}.") for q in questions])
    assert [v.reason for v in verdicts] == ["correct"] * 242
    assert len(published) == 270 == 242 + task.set_aside[SENTENCE] + len(UNREADABLE)
    assert [where for where, _ in task.dropped] == [f"{FILE}: row {number}" for number in UNREADABLE]
    assert {reason.partition(": ")[2] for _, reason in task.dropped} == {"math-verify cannot parse it"}


def test_an_answer_of_another_question_is_wrong(task: Champ) -> None:
    questions = task.questions("eval", None)
    answers = Counter(question.answer for question in questions)
    rare = [q for q in questions if answers[q.answer] == 1 and not q.answer.isdigit()][:12]
    verdicts = task.verify_all([(q, rf"\boxed{{{other.answer}}}") for q, other in pairwise(rare)])
    assert not any(verdict.reward for verdict in verdicts)


def test_what_is_set_aside_is_a_sentence(published: list[Row]) -> None:
    said: list[str] = []
    for row in published:
        try:
            parse_gold(row["_raw_answer"])
        except SetAside:
            said.append(row["_raw_answer"])
    assert len(said) == 26
    assert {len(answer.split()) > 2 or answer == "Monotonically increasing" for answer in said} == {True}


@pytest.mark.parametrize(
    ("raw", "latex"),
    [
        ("@@C(10, 5)@@, or equivalently @@252@@", "252"),
        ("@@5/14@@, or approximately 35.7%", "5/14"),
        ("@@C(n+1, 2m+1)@@", r"\binom{n+1}{2m+1}"),
        ("@@2^997@@", "2^{997}"),
        ("@@2^(n-1)@@", "2^{n-1}"),
        ("100 (i.e., all values)", "100"),
        ("@@k-2@@ (i.e., all of them)", "k-2"),
        ("0 (none of the values)", "0"),
        ("3 is the only possible value", "3"),
        ("At least 1 number", "1"),
        ("At most 0 integer-valued zeros (i.e., no integer zeros)", "0"),
        ("Exactly one sequence", "1"),
        ("98 values", "98"),
        ("@@n@@ times", "n"),
        ("1, 4 and 9", "1, 4, 9"),
        ("@@x=16@@ and @@x=81@@", "x=16, x=81"),
        ("The limit exists and is equal to @@(1+sqrt(4a+1))/2@@", r"(1+\sqrt{4a+1})/2"),
        ("No", r"\text{No}"),
    ],
)
def test_the_latex_of_an_answer(raw: str, latex: str) -> None:
    assert parse_gold(raw) == latex


def test_questions_carry_their_written_solution(task: Champ, published: list[Row]) -> None:
    question = task.questions("eval", 1)[0]
    assert question.id == "champ/P_Combinatorics_1" and question.answer == "239"
    assert question.meta["category"] == "Combinatorics" and question.meta["solution"].startswith("Let x_n, y_n, z_n be")
    assert task.statement(question) == published[0]["_text"] and "@@" not in question.text
