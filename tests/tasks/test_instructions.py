"""Instruction following, graded by if-verifiable in killable workers."""

import json
from pathlib import Path

import pytest

from sdzero.graders import instructions
from sdzero.graders.errors import GraderError
from sdzero.graders.instructions import Followed, work
from sdzero.tasks.instructions import Instructions

# made-up rows with IFEval's columns: kwargs hold null for what an instruction does not take
ROWS = [
    {
        "key": 1,
        "prompt": "Write about rain, in lower case and without commas.",
        "instruction_id_list": ["change_case:english_lowercase", "punctuation:no_comma"],
        "kwargs": [{"keywords": None}, {}],
    },
    {
        "key": 2,
        "prompt": "Name a city twice.",
        "instruction_id_list": ["keywords:frequency"],
        "kwargs": [{"keyword": "Rome", "frequency": 2, "relation": "at least"}],
    },
]


def task(tmp_path: Path, rows=ROWS, **options) -> Instructions:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Instructions({"eval": str(tmp_path / "rows.jsonl")}, "ifeval", **options)


def test_correct_means_all_instructions_followed(tmp_path: Path) -> None:
    questions = task(tmp_path).questions("eval", 2)
    said = [
        (questions[0], "it rains a lot in this part of the world."),
        (questions[0], "it rains, a lot."),
        (questions[0], "<think>Hm, RAIN.</think>it rains a lot in this part of the world."),
        (questions[0], ""),
        (questions[1], "Rome is Rome."),
        (questions[1], "Rome."),
    ]
    verdicts = task(tmp_path).verify_all(said)
    assert [verdict.reward for verdict in verdicts] == [1, 0, 1, 0, 1, 0]
    assert verdicts[1].parsed == "punctuation:no_comma"


def test_loose_forgives_a_first_line(tmp_path: Path) -> None:
    question = task(tmp_path).questions("eval", 1)[0]
    said = "Sure, here it is:\nit rains a lot in this part of the world."
    assert task(tmp_path).verify(question, said).reward == 0
    assert task(tmp_path, loose=True).verify(question, said).reward == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instruction_id_list": ["no:such", "punctuation:no_comma"]}, "no instruction 'no:such'"),
        ({"kwargs": [{}]}, "2 instructions, but kwargs for 1"),
        ({"instruction_id_list": [], "kwargs": []}, "it has no instructions"),
    ],
)
def test_a_question_that_cannot_be_checked_is_left_out(tmp_path: Path, change: dict, reason: str) -> None:
    checked = task(tmp_path, [*ROWS, {**ROWS[0], "key": 3, "prompt": "Again", **change}], max_dropped_share=0.5)
    assert [q.id for q in checked.questions("eval", 2)] == ["instructions/1", "instructions/2"]
    assert len(checked.dropped) == 1 and reason in checked.dropped[0][1]


def test_missing_nltk_data_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    row = {**ROWS[0], "instruction_id_list": ["length_constraints:number_sentences"]}
    row["kwargs"] = [{"num_sentences": 2, "relation": "at least"}]
    with pytest.raises(GraderError, match="python -m nltk.downloader punkt"):
        task(tmp_path, [row], deadline=11.0, num_workers=1).questions("eval", 1)  # workers of its own, which start here


def test_random_defaults_of_instructions_are_seeded() -> None:
    item = instructions.Item("ifeval", "", ("keywords:existence",), ({},), False, "nothing much")
    assert work(item) == work(item) == Followed(("keywords:existence",))
