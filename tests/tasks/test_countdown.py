from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.tasks import Countdown, splits
from sdzero.tasks.countdown import numbers_of, parse, value_of
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.splits import split_of
from sdzero.types import Question, Split
from support.fixtures.make import make
from support.fixtures.mathematics import COUNTDOWN, countdown_row

QUESTION = Question("countdown/24:1,3,4,6", "", "6/(1-3/4)", {"numbers": [3, 1, 6, 4], "target": 24})


@pytest.mark.parametrize(
    ("boxed", "reason"),
    [
        ("6/(1-3/4)", "correct"),  # exact: 23.999999999999996 in floats would be wrong elsewhere
        ("6 / (1 - 3 / 4) = 24", "correct"),
        (r"6 \div (1 - 3 \div 4)", "correct"),
        ("4*6*1", "wrong"),  # 3 is not used
        ("4*6*1+3-3", "wrong"),  # 3 is used twice
        ("4*6+3-1", "wrong"),
        ("24", "wrong"),
        ("6/(4-3-1)", "wrong"),  # divides by zero
        ("4*6*1**3", "unparseable"),
        ("4*6//1-3+3", "unparseable"),
        ("-4*-6*1*3", "unparseable"),
        ("9**9**9", "unparseable"),
        ("__import__('os').system('true')", "unparseable"),
        ("[4*6*1*3]", "unparseable"),
        ("4*6*1*3.0", "unparseable"),
        ("4(6)(1)(3)", "unparseable"),
        ("1+" * 100 + "1", "unparseable"),  # longer than an expression may be
        ("(" * 99 + "1" + ")" * 99, "wrong"),
        ("4*(6*1*3", "unparseable"),
        ("= 24", "unparseable"),
    ],
)
def test_verdicts(boxed: str, reason: str) -> None:
    verdict = Countdown().verify(QUESTION, rf"\boxed{{{boxed}}}")
    assert (verdict.reward, verdict.reason) == (int(reason == "correct"), reason)


def test_the_last_box_counts() -> None:
    assert Countdown().verify(QUESTION, r"\boxed{6/(1-3/4)} or \boxed{4*6}").reason == "wrong"
    assert Countdown().verify(QUESTION, "6/(1-3/4)").reason == "unparseable"


expressions = st.recursive(
    st.integers(0, 30).map(lambda n: (str(n), Fraction(n), [n])),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: combine(*parts)),
    max_leaves=6,
)


def combine(left, symbol: str, right):
    """Return an expression's text, its independently computed value (None: division by zero) and its numbers."""
    (a_text, a, a_numbers), (b_text, b, b_numbers) = left, right
    value = None
    if a is not None and b is not None and not (symbol == "/" and b == 0):
        value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[symbol]()
    return f"({a_text}{symbol}{b_text})", value, a_numbers + b_numbers


@given(expressions)
def test_parser_and_value_against_a_value_built_alongside(expression) -> None:
    text, value, numbers = expression
    tree = parse(text)
    assert tree is not None
    assert numbers_of(tree) == sorted(numbers)
    if value is None:
        with pytest.raises(ZeroDivisionError):
            value_of(tree)
    else:
        assert value_of(tree) == value


def test_questions_keep_the_rules() -> None:
    questions = Countdown(seed=2, min_numbers=3, max_numbers=4, max_value=50).questions("phase1", 200)
    keys = {(question.meta["target"], tuple(sorted(question.meta["numbers"]))) for question in questions}
    assert len(keys) == 200
    for question in questions:
        numbers, target = question.meta["numbers"], question.meta["target"]
        assert len(numbers) in (3, 4)
        assert all(1 <= n <= 50 for n in [*numbers, target])
        assert str(numbers) in question.text
        assert f"equals {target}" in question.text


def test_questions_ignore_the_order_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "_MAX_REPEATS", 500)
    small = Countdown(min_numbers=2, max_numbers=2, max_value=3)
    with pytest.raises(ValueError, match="holds only") as error:
        small.questions("phase1", 1000)
    assert int(str(error.value).split("only ")[1].split(":")[0]) <= 18  # 6 pairs without order, 3 targets


@pytest.mark.parametrize("settings", [{"min_numbers": 1}, {"min_numbers": 5}, {"max_numbers": 7}, {"max_value": 1}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        Countdown(**settings)


# --- published rows -------------------------------------------------------------------------------

SPLITS: tuple[Split, ...] = ("phase1", "phase2", "eval")


@pytest.fixture
def published(tmp_path: Path) -> Countdown:
    return Countdown(path=HubDataset(str(make(tmp_path, COUNTDOWN))))


def test_published_duplicates_are_removed(published: Countdown) -> None:
    questions = [question for split in SPLITS for question in published.questions(split, None)]
    assert len(questions) == 37 == len({question.id for question in questions})  # 40 rows, of which 3 repeat others
    identities = [question.id.removeprefix("countdown/") for question in questions]
    assert [split_of(identity) for identity in identities] == [s for s in SPLITS for _ in published.questions(s, None)]


def test_a_published_row_is_the_question_of_the_stream(tmp_path: Path) -> None:
    """Id, split and text are the same, so training on one never sees questions held out of the other."""
    made = {split: Countdown(seed=3).questions(split, 20) for split in SPLITS}
    rows = [{"target": q.meta["target"], "nums": q.meta["numbers"]} for split in SPLITS for q in made[split]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = Countdown(path=str(tmp_path / "rows.jsonl"))
    for split in SPLITS:
        questions = read.questions(split, None)
        assert [(q.id, q.text, q.meta) for q in questions] == [(q.id, q.text, q.meta) for q in made[split]]
        answers = [(q, rf"\boxed{{{known.answer}}}") for q, known in zip(questions, made[split], strict=True)]
        assert [verdict.reward for verdict in read.verify_all(answers)] == [1] * 20


def test_published_rows_are_verified(published: Countdown) -> None:
    questions = {question.id: question for split in SPLITS for question in published.questions(split, None)}
    for number in range(36):
        row = countdown_row(number)
        question = questions[f"countdown/{row['target']}:{','.join(map(str, sorted(row['nums'])))}"]
        *first, b, c = row["nums"]
        said = f"{' * '.join(map(str, first))} + {b} - {c}"
        assert published.verify(question, rf"\boxed{{{said}}}").reward == 1
        assert published.verify(question, rf"\boxed{{{row['target']}}}").reward == 0
        assert question.answer == ""


def test_published_split_that_is_too_small_is_an_error(published: Countdown) -> None:
    there = len(published.questions("eval", None))
    with pytest.raises(ValueError, match=rf"split 'eval' of task 'countdown: .* holds only {there}"):
        published.questions("eval", there + 1)


@pytest.mark.parametrize(("target", "nums"), [(3.5, [1, 2]), (3, "1 2"), (3, [])])
def test_rows_without_integers_are_refused(tmp_path: Path, target: Any, nums: Any) -> None:
    rows = [{"target": 3, "nums": [1, 2]}, {"target": target, "nums": nums}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"rows.jsonl: row 2: target and nums must be integers"):
        Countdown(path=str(tmp_path / "rows.jsonl")).questions("eval", None)
