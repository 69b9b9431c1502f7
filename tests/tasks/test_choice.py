from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdzero.tasks.choice import MultipleChoice, stated_letter
from sdzero.types import Question
from support.rows import jsonl

OPTIONS = ["red", "green", "blue", "I do not know"]


def rows_of(num: int, answer: int | str, column: str = "options") -> list[dict[str, Any]]:
    return [{"question": f"q{i}", column: OPTIONS, "answer": answer, "subject": "s"} for i in range(num)]


def refusal(path: Path, row: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="row 1") as error:
        MultipleChoice(jsonl(path / "q.jsonl", [row])).questions("eval", 1)
    return str(error.value)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{ B. }", "B"),
        (r"\boxed{B)}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{(\text{B})}", "B"),
        (r"\boxed{\textbf{B}}", "B"),
        (r"\boxed{$B$}", "B"),
        (r"\boxed{B. green}", "B"),
        (r"\boxed{B: green}", "B"),
        (r"\boxed{(B) green}", "B"),
        (r"\boxed{\text{B. green}}", "B"),
        (r"\boxed{B. A green one}", "B"),
        (r"\boxed{A}, no, \boxed{C}", "C"),
        (r"The answer is (A). \boxed{B}", "B"),
        (r"\boxed{B} The answer is (A).", "B"),
        (r"<think>\boxed{A}</think>\boxed{B}", "B"),
        ("The answer is (B).", "B"),
        ("The answer is B.", "B"),
        ("the final answer is: (B)", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("The answer is **B**.", "B"),
        ("The answer is **(B)** green", "B"),
        ("The answer is (A). No, the answer is (C).", "C"),
        (r"\boxed{b}", None),
        (r"\boxed{BC}", None),
        (r"\boxed{B, C}", None),
        (r"\boxed{B. C.}", None),
        (r"\boxed{B and C}", None),
        (r"\boxed{(B) or (C)}", None),
        (r"\boxed{green}", None),
        (r"\boxed{1}", None),
        (r"\boxed{}", None),
        (r"\boxed{A} \boxed{}", None),
        (r"\boxed{B", None),
        ("\\boxed{Β}", None),  # a Greek capital
        ("The answer is A dog.", None),
        ("The answer is (A) or (B).", None),
        ("The answer is not (A).", None),
        ("I think B.", None),
        ("B", None),
        ("", None),
        (r"<think>The answer is (B).", None),
        (r"<think>\boxed{B}</think>", None),
    ],
)
def test_the_last_stated_letter(response: str, letter: str | None) -> None:
    assert stated_letter(response) == letter


@pytest.mark.parametrize(
    ("response", "reason"),
    [(r"\boxed{B}", "correct"), (r"\boxed{A}", "wrong"), (r"\boxed{E}", "unparseable"), ("?", "unparseable")],
)
def test_verdicts(tmp_path: Path, response: str, reason: str) -> None:
    _, question = MultipleChoice(jsonl(tmp_path / "q.jsonl", rows_of(1, 1)))._all[0]
    verdict = MultipleChoice("").verify(question, response)
    assert (verdict.reward, verdict.reason) == (int(reason == "correct"), reason)
    assert (verdict.parsed is None) == (reason == "unparseable")


def test_options_are_lettered_lines(tmp_path: Path) -> None:
    _, question = MultipleChoice(jsonl(tmp_path / "q.jsonl", rows_of(1, 1)), instruction="Say one.")._all[0]
    assert question.text == "q0\n\nA. red\nB. green\nC. blue\nD. I do not know\n\nSay one."
    _, question = MultipleChoice(jsonl(tmp_path / "q.jsonl", rows_of(1, 1)), instruction="")._all[0]
    assert question.text.endswith("D. I do not know")


@pytest.mark.parametrize(("answer", "letter"), [(0, "A"), (3, "D"), ("D", "D"), ("2", "C")])
def test_an_answer_is_an_index_or_a_letter(tmp_path: Path, answer: int | str, letter: str) -> None:
    path = jsonl(tmp_path / "q.jsonl", rows_of(2, answer, "choices"))
    assert {q.answer for _, q in MultipleChoice(path, options_column="choices")._all} == {letter}


@pytest.mark.parametrize("answer", [4, -1, "E", "d", "green", 1.0, True])
def test_an_answer_beyond_the_options_is_an_error(tmp_path: Path, answer: Any) -> None:
    assert f"the answer '{answer}' is not one of its 4 options" in refusal(tmp_path, rows_of(1, answer)[0])


def test_padding_options_are_removed(tmp_path: Path) -> None:
    rows = rows_of(1, 3)
    rows[0]["options"] = ["red", "N/A", "green", "blue", "N/A"]
    _, question = MultipleChoice(jsonl(tmp_path / "q.jsonl", rows))._all[0]
    assert "A. red\nB. green\nC. blue\n\n" in question.text and "N/A" not in question.text
    assert question.answer == "C" and question.meta["options"] == ["red", "green", "blue"]
    assert "the answer '1' is not one of its 3 options" in refusal(tmp_path, {**rows[0], "answer": 1})


def test_one_question_with_other_options_is_another(tmp_path: Path) -> None:
    """For example "Which of the following is true?"."""
    rows = [{"question": "Which?", "options": [f"a{i}", f"b{i}"], "answer": "A"} for i in range(9)]
    questions = [q for _, q in MultipleChoice(jsonl(tmp_path / "q.jsonl", [*rows, rows[0]]))._all]
    assert len({q.id for q in questions}) == len(questions) == 9
    assert all(q.id.startswith("multiplechoice/") for q in questions)


def test_invalid_options_are_refused(tmp_path: Path) -> None:
    for options in (None, "A. red", {"A": "red"}, [["red"]], [None, "red"]):
        said = refusal(tmp_path, {"question": "q", "options": options, "answer": "A"})
        assert "column 'options' is not a list of options" in said
    for options in ([], ["red"], ["red", "N/A"], [str(i) for i in range(27)]):
        assert "is not one of its" in refusal(tmp_path, {"question": "q", "options": options, "answer": "A"})


def test_a_question_without_its_options_cannot_be_graded() -> None:
    with pytest.raises(KeyError):
        MultipleChoice("").verify(Question("", "q", "A"), r"\boxed{A}")
