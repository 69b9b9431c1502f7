from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.recipes.own_data.verifier import LastDigit
from sdzero.tasks import Rows
from sdzero.types import Question, Verdict
from support.rows import from_config, jsonl
from support.runs import ROOT, refusal

SPLITS = ("phase1", "phase2", "eval")


class Equal(Rows):
    def verify(self, question: Question, response: str) -> Verdict:
        return Verdict(1, "correct", response) if response == question.answer else Verdict(0, "wrong", response)


def rows_of(num: int, word: str = "q") -> list[dict[str, Any]]:
    return [{"question": f"{word}{i}", "answer": i, "solution": f"it is {i}"} for i in range(num)]


def everything(task: Rows) -> list[Question]:
    """Return all questions of all splits, in file order."""
    return [question for _, question in task._all]


# --- what a row becomes ---------------------------------------------------------------------------


def test_every_row_lands_in_one_split_with_its_other_columns(tmp_path: Path) -> None:
    rows = rows_of(200)
    task = Equal(jsonl(tmp_path / "q.jsonl", rows))
    questions = everything(task)
    assert [q.text for q in questions] == [row["question"] for row in rows]
    assert [q.answer for q in questions] == [str(row["answer"]) for row in rows]
    assert [q.meta for q in questions] == [{"solution": row["solution"]} for row in rows]
    sizes = [sum(split == of for of, _ in task._all) for split in SPLITS]
    assert sum(sizes) == 200 and sizes[0] > 60 < sizes[1] and 20 < sizes[2] < 60, sizes
    for split, size in zip(SPLITS, sizes, strict=True):
        chosen = task.questions(split, size)
        assert chosen == [q for q in questions if q in chosen]
        with pytest.raises(ValueError, match=rf"num_questions={size + 1}, but split '{split}' of .*holds only {size}"):
            task.questions(split, size + 1)


def test_a_questions_split_and_id_depend_on_its_text_alone(tmp_path: Path) -> None:
    first = Equal(jsonl(tmp_path / "a.jsonl", rows_of(50)))._all
    again = Equal(jsonl(tmp_path / "b.jsonl", rows_of(80)[::-1]))._all
    assert {(split, q.id, q.text) for split, q in first} < {(split, q.id, q.text) for split, q in again}


def write_list(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def write_with_mark(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSONL as some editors do: byte-order mark, carriage returns, empty lines."""
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("q.jsonl", jsonl),
        ("q.json", jsonl),  # some call it so
        ("q.json", write_list),
        ("q.jsonl", write_with_mark),
        ("q.parquet", lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path)),
    ],
)
def test_formats_are_equivalent(tmp_path: Path, name: str, write: Callable[[Path, Any], Any]) -> None:
    rows = [{"problem": f"q{i}", "gold": i, "level": [1, 2], "u": "line\u2028break"} for i in range(20)]
    write(tmp_path / name, rows)
    questions = everything(Equal(str(tmp_path / name), "problem", "gold"))
    assert [(q.text, q.answer) for q in questions] == [(f"q{i}", str(i)) for i in range(20)]
    assert all(q.meta == {"level": [1, 2], "u": "line\u2028break"} for q in questions)


def test_answers_keep_their_json_text(tmp_path: Path) -> None:
    """A typed table column would turn a 3 beside a 2.5 into 3.0, and a date into a timestamp."""
    written = ("3", "2.5", "12345678901234567890123", '"2020-01-01"', '"007"', '" Rome\\n"', "0")
    path = tmp_path / "q.jsonl"
    path.write_text("".join(f'{{"question": "q{i}", "answer": {answer}}}\n' for i, answer in enumerate(written)))
    answers = ["3", "2.5", "12345678901234567890123", "2020-01-01", "007", "Rome", "0"]
    assert [question.answer for question in everything(Equal(str(path)))] == answers


def test_ids_of_a_column(tmp_path: Path) -> None:
    rows = [{**row, "key": 100 + row["answer"]} for row in rows_of(5)]
    path = jsonl(tmp_path / "q.jsonl", rows)
    assert [q.id for q in everything(Equal(path, id_column="key"))] == [f"equal/{100 + i}" for i in range(5)]
    assert "key" in everything(Equal(path))[0].meta
    rows[3]["key"] = 101
    jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 4 has the id of .*row 2 \('equal/101'\), but another question"):
        Equal(path, id_column="key").questions("eval", 1)


def test_without_a_gold_answer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", [{"question": "q", "key": 7, "answer": None}])
    assert everything(Equal(path, answer_column=None)) == [
        Question("equal/2b3570fb29bd1435", "q", "", {"key": 7, "answer": None})
    ]
    assert everything(Equal(path, answer_column=None, id_column="key"))[0].id == "equal/7"


def test_a_file_for_each_split(tmp_path: Path) -> None:
    paths: Any = {split: jsonl(tmp_path / f"{split}.jsonl", rows_of(6, split)) for split in SPLITS}
    task = Equal(paths)
    for split in SPLITS:
        assert [q.text for q in task.questions(split, 6)] == [f"{split}{i}" for i in range(6)]
    jsonl(tmp_path / "eval.jsonl", [*rows_of(6, "eval"), *rows_of(1, "phase2")])
    with pytest.raises(ValueError, match=r"eval.jsonl: row 7 repeats .*phase2.jsonl: row 1 of another split"):
        Equal(paths).questions("phase1", 1)
    paths.pop("eval")
    assert len(Equal(paths).questions("phase1", None)) == 6 and Equal(paths).questions("eval", None) == []
    with pytest.raises(ValueError, match=r"task.path: expected one source, or one for each of .*got \['train'\]"):
        Equal({"train": paths["phase1"]})  # pyright: ignore[reportArgumentType]


# --- mistakes -------------------------------------------------------------------------------------


def test_repeated_questions_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "q.jsonl", [*rows_of(4), *rows_of(2)])
    assert [q.text for q in everything(Equal(path))] == ["q0", "q1", "q2", "q3"]
    assert f"left out 2 duplicate questions, e.g. {path}: row 5 repeats {path}: row 1" in caplog.text


class NoEights(Equal):
    def find_ungradable(self, questions: Sequence[Question]) -> dict[str, str]:
        self.looked_at = [question.text for question in questions]
        return {question.id: "eights are odd" for question in questions if "8" in question.answer}


def test_ungradable_questions_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "q.jsonl", [*rows_of(30), *rows_of(2)])
    task = NoEights(path, max_dropped_share=0.1)
    assert task.dropped == []
    assert [q.answer for q in everything(task)] == [str(i) for i in range(30) if i not in (8, 18, 28)]
    assert task.looked_at == [f"q{i}" for i in range(30)]  # all at once, and repeats only once
    assert task.dropped == [(f"{path}: row {n}", "eights are odd") for n in (9, 19, 29)]
    assert f"left out 3 of 30 questions that cannot be graded, e.g. {path}: row 9: eights are odd" in caplog.text


def test_too_many_ungradable_questions_are_an_error(tmp_path: Path) -> None:
    paths: Any = {split: jsonl(tmp_path / f"{split}.jsonl", rows_of(10, split)) for split in SPLITS}
    said = r"has 3 of 30 questions that cannot be graded, e.g. .*phase1.jsonl: row 9: eights are odd: fix .*=0.099"
    with pytest.raises(ValueError, match=said):
        NoEights(paths, max_dropped_share=0.099).questions("eval", 1)
    with pytest.raises(ValueError, match=r"cannot be graded.*max_dropped_share=0.05"):
        NoEights(paths).questions("eval", 1)
    with pytest.raises(ValueError, match=r"task.max_dropped_share must lie in \[0, 1\], got 5"):
        NoEights(paths, max_dropped_share=5)


@pytest.mark.parametrize("column", ["question", "answer"])
@pytest.mark.parametrize("value", [None, "  \n", float("nan"), "absent"])
def test_incomplete_rows_are_located_and_counted(tmp_path: Path, column: str, value: Any) -> None:
    rows = rows_of(9)
    for i in (4, 6):
        rows[i] = {k: v for k, v in rows[i].items() if k != column} | ({} if value == "absent" else {column: value})
    path = jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(ValueError, match=rf"2 of 9 incomplete or .* rows, e.g. .*: row 5: column '{column}' is empty"):
        Equal(path).questions("eval", 1)
    task = Equal(path, max_dropped_share=0.3)
    assert [q.text for q in everything(task)] == [f"q{i}" for i in (0, 1, 2, 3, 5, 7, 8)]
    assert task.dropped == [(f"{path}: row {n}", f"column '{column}' is empty") for n in (5, 7)]


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", rows_of(3))
    for key in ("question_column", "answer_column", "id_column"):
        options: Any = {key: "gold"}
        with pytest.raises(ValueError, match=rf"task.{key}: {path} has no column 'gold'; it has \['answer', 'ques"):
            Equal(path, **options).questions("eval", 1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("q.jsonl", b'{"question": "q", "answer": 1}\n{"question": \n', "line 2 is not valid JSON"),
        ("q.jsonl", b'{"question": "q", "answer": 1}\n\xff\n', "line 2 is not valid JSON"),
        ("q.csv", b"question,answer\nq,1\n", "line 1 is not valid JSON"),
        ("q.json", b'["q", "r"]', "row 1 is not a JSON object: expected one JSON object per line, or one list"),
        ("q.jsonl", b"", r"has no column 'question'; it has \[\]"),
        ("q.jsonl", b'{"question": "q", "answer": [1, 2]}', "column 'answer' is a list: it must be text or a number"),
        ("q.parquet", b"question", "is not a parquet file"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / name}.*{said}"):
        Equal(str(tmp_path / name)).questions("eval", 1)


def test_cells_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "when": date(2020, 1, 1)} for row in rows_of(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match="row 1: column 'when': .*date is not JSON serializable: convert it to text"):
        Equal(str(tmp_path / "q.parquet")).questions("eval", 1)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"task.path: no file {tmp_path}/q.jsonl"):
        Equal(str(tmp_path / "q.jsonl")).questions("eval", 1)


# --- in a config ----------------------------------------------------------------------------------


def test_a_config_names_the_subclass(tmp_path: Path) -> None:
    paths = {split: jsonl(tmp_path / f"{split}.jsonl", rows_of(3, split)) for split in SPLITS}
    task = from_config("configs.recipes.own_data.verifier.LastDigit", path=paths)
    assert isinstance(task, LastDigit) and len(task.questions("eval", 3)) == 3
    with pytest.raises(ValueError, match=r"task.path: expected one source.*got \['dev'\]"):
        from_config(f"{LastDigit.__module__}.LastDigit", path={"dev": "q.jsonl"})


@pytest.mark.parametrize(("command", "stage"), [("collect", "collect"), ("fit", "self_distill"), ("test", "eval")])
def test_commands_fail_before_loading_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, stage: str
) -> None:
    """The model folder has no weights, so loading them would fail first."""
    prefix, out = ("", "out") if command == "collect" else ("data.", "trainer.default_root_dir")
    model = "student.path" if command == "collect" else "model.student.path"
    options = {f"{prefix}task.question_column": "text", model: "configs/tiny_model", out: tmp_path}
    config = ROOT / f"configs/recipes/own_data/{stage}.yaml"
    said = refusal(capsys, monkeypatch, command, "--config", config, *(f"--{k}={v}" for k, v in options.items()))
    assert "task.question_column: configs/recipes/own_data/questions.jsonl has no column 'text'; it has ['gold'" in said


def test_rows_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract.*verify"):
        Rows("q.jsonl")  # pyright: ignore[reportAbstractUsage]


# --- the shipped example's verifier ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("3-7=6*1=6A6", "correct"),
        ("3-7=6*1=5A5\n\nWait, this response is not correct, let me start over.\n\n3-7=6*1=6A6", "correct"),
        ("3-7=6*1=6A 6\n", "correct"),
        ("3-7=6*1=6A5", "wrong"),
        ("3-7=6*1=6A66", "unparseable"),
        ("3-7=6*1=6", "unparseable"),
        ("A6 A", "unparseable"),
        ("A\u0666", "unparseable"),  # a digit of another script
    ],
)
def test_verdicts_of_the_example(response: str, reason: str) -> None:
    verdict = LastDigit("").verify(Question("", "3-7*1=", "6"), response)
    assert (verdict.reward, verdict.reason) == (int(reason == "correct"), reason)
