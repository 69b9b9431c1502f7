from __future__ import annotations

import re

import pytest

from sdzero.tasks import Chains
from sdzero.tasks.chains import solve, working
from sdzero.types import Question

QUESTION = Question("chains/6+3*9-4=", "6+3*9-4=", "7")


def test_the_written_example() -> None:
    steps = [("+", 3), ("*", 9), ("-", 4)]
    assert solve(6, steps) == [9, 1, 7]
    assert working(6, steps, [9, 1, 7]) == "6+3=9*9=1-4=7A7"


def test_answers_against_python_integers() -> None:
    """Reducing modulo 10 at every step equals reducing once at the end."""
    for question in Chains(seed=3).questions("phase1", 200):
        first, *steps = re.findall(r"[+*-]?\d", question.text)
        assert 4 <= len(steps) <= 8
        expression = "(" * len(steps) + first + "".join(f"{step})" for step in steps)
        assert question.answer == str(eval(expression) % 10)
        pairs = [(step[0], int(step[1])) for step in steps]
        answer = working(int(first), pairs, solve(int(first), pairs))
        assert Chains().verify(question, answer).reward == 1


@pytest.mark.parametrize(
    ("response", "reason", "parsed"),
    [
        ("6+3=9*9=1-4=7A7", "correct", "7"),
        ("6+3=9*9=1-4=7A8", "wrong", "8"),
        ("A8\n\nWait, this response is not correct, let me start over.\n\nA7", "correct", "7"),
        ("A7 \n", "correct", "7"),
        ("A7\n\nLet me rephrase the above solution.", "unparseable", None),
        ("7", "unparseable", None),
        ("A77", "unparseable", None),
        ("A", "unparseable", None),
        ("A٧", "unparseable", None),
    ],
)
def test_the_verifier_reads_what_follows_the_last_mark(response: str, reason: str, parsed: str | None) -> None:
    verdict = Chains().verify(QUESTION, response)
    assert (verdict.reward, verdict.reason, verdict.parsed) == (int(reason == "correct"), reason, parsed)


def test_the_seed_changes_the_questions_but_not_their_split() -> None:
    one, two = (Chains(seed=seed, min_ops=1, max_ops=2) for seed in (1, 2))
    assert one.questions("eval", 30) != two.questions("eval", 30)
    eval_ids = {question.id for question in one.questions("eval", 500)}
    assert not eval_ids & {question.id for question in two.questions("phase1", 500)}


def test_too_few_distinct_questions() -> None:
    with pytest.raises(ValueError, match=r"num_questions=301.*holds only"):
        Chains(min_ops=1, max_ops=1).questions("phase1", 301)


@pytest.mark.parametrize(("low", "high"), [(0, 3), (5, 4)])
def test_lengths_are_checked(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="min_ops"):
        Chains(min_ops=low, max_ops=high)
