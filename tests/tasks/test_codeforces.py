"""Codeforces against an independent, slow reader of the made-up repository."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdzero.graders.sandbox.types import Limits, StdioTest
from sdzero.tasks import Codeforces
from sdzero.tasks import codeforces as module
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.splits import Sizes
from sdzero.types import Split
from support.fake_sandbox import fake_sandbox  # noqa: F401 - a fixture
from support.fixtures.make import make
from support.fixtures.programs import CODEFORCES, CODEFORCES_ODD
from support.fixtures.repository import rename_column
from support.rows import from_config, jsonl

SPLITS: tuple[Split, ...] = ("phase1", "phase2", "eval")
LANGUAGES = ("cpp", "python")
Row = dict[str, Any]
pytestmark = pytest.mark.usefixtures("fake_sandbox")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("codeforces"), CODEFORCES)


@pytest.fixture
def hub_files(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Record the requests to the repository."""
    recorder = Mock(wraps=module.hub_files)
    monkeypatch.setattr(module, "hub_files", recorder)
    return recorder


def task_of(repository: Path, config: str = "verifiable", **options: Any) -> Codeforces:
    given = {"sizes": None, "max_dropped_share": 0.2, **options}
    return Codeforces(HubDataset(str(repository), config=config), **given)


def slow_reading(repository: Path, rows: list[Row]) -> tuple[dict[str, list[tuple[str, str]]], dict[str, str]]:
    """Return the tests by problem, and the reason of exclusion by excluded problem."""
    generated = read_folder(repository / "generated_tests", "*")
    asked: dict[str, list[tuple[str, str]]] = {}
    left_out: dict[str, str] = {}
    for row in rows:
        tests = [(test["input"], test["output"]) for test in row["official_tests"] or []]
        if not row["official_tests_complete"]:
            tests = [pair for pair in tests if not pair[0].endswith("...") and not pair[1].endswith("...")]
            tests += [(test["input"], test["output"]) for test in generated if test["problem_id"] == row["id"]]
        if row["interaction_format"]:
            left_out[row["id"]] = "interactive"
        elif not row["executable"]:
            left_out[row["id"]] = "executable"
        elif not row["official_tests_complete"] and row["generated_tests"] == 0:
            left_out[row["id"]] = "official_tests_complete"
        else:
            asked[row["id"]] = [(one.replace("\r", ""), other.replace("\r", "")) for one, other in tests]
    return asked, left_out


def read_folder(folder: Path, files: str = "train-*") -> list[Row]:
    return [row for file in sorted(folder.glob(files)) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize(("config", "folder"), [("verifiable", "verifiable"), ("default", "data")])
def test_questions_and_tests_against_a_slow_reader(repository: Path, config: str, folder: str) -> None:
    rows = read_folder(repository / folder)
    asked, left_out = slow_reading(repository, rows)
    task = task_of(repository, config)
    questions = [question for _, question in task._all]
    assert [q.id for q in questions] == [f"codeforces/{id}/{language}" for id in asked for language in LANGUAGES]
    by_id = {row["id"]: row for row in rows}
    for question in questions:
        row, submission = by_id[question.meta["problem"]], task._submissions[question.id]
        assert task.tests(question) == tuple(StdioTest(*test) for test in asked[row["id"]])
        assert (submission.limits.time, submission.limits.memory_mb) == (row["time_limit"], row["memory_limit"])
        assert submission.language == question.meta["language"] == question.id.rpartition("/")[2]
        assert (submission.checker.source if submission.checker else None) == row["generated_checker"]
        assert (submission.files is not None) == (row["input_mode"] == "file")
        assert all(row[column] in question.text for column in ("title", "input_format", "output_format"))
        assert question.meta["rating"] == row["rating"]
        assert len(json.dumps(dict(question.meta))) < 500, "each trace carries it"
    set_aside = [why for why in left_out.values() if why != "official_tests_complete"]
    assert task.set_aside.total() == len(set_aside)
    incomplete = "its official_tests are incomplete (official_tests_complete), and it has no generated_tests"
    assert [why for _, why in task.dropped] == [incomplete] * (len(left_out) - len(set_aside))
    assert {*CODEFORCES_ODD} <= {*asked, *left_out} or config == "verifiable"


def test_prompt_text(repository: Path) -> None:
    task = task_of(repository)
    questions = {question.id: question for _, question in task._all}
    assert questions["codeforces/905/A/python"].text == (
        "# Made up: the sum\n\n"
        "Made up: given two numbers, print the sum of them (no. 905/A).\n\n"
        "## Input\n\nOne line holds two integers.\n\n"
        "## Output\n\nPrint one integer.\n\n"
        "## Example 1\n\nInput:\n```\n1 2\n```\nOutput:\n```\n3\n```\n\n"
        "Time limit per test: 1 s. Memory limit: 256 MB.\n\n"
        "The program reads its input from input.txt and writes its output to output.txt.\n\n"
        "Write the whole program in Python 3, in one block fenced by ```python and ```."
    )
    assert "given $a$ and $b$ with $a \\le b^2$, print $a + b$." in questions["codeforces/912/F/cpp"].text
    assert "Example" not in questions["codeforces/914/A/cpp"].text
    assert "0.5 s. Memory limit: 62.5 MB." in questions["codeforces/914/A/cpp"].text
    assert task.statement(questions["codeforces/800/A/cpp"]) == task.statement(questions["codeforces/800/A/python"])
    assert not any("\r" in question.text for question in questions.values())


def test_note_and_lines_of_a_statement() -> None:
    row = {"title": "T", "description": "a\r\nb", "note": "$$$n$$$ is\r\nsmall", "editorial": "SECRET"}
    row["examples"] = [{"input": "1\r\n2\r\n", "output": "3"}, {"input": "", "output": "4\n"}]  # pyright: ignore[reportArgumentType]
    assert module.format_statement(row) == (
        "# T\n\na\nb\n\n"
        "## Example 1\n\nInput:\n```\n1\n2\n```\nOutput:\n```\n3\n```\n\n"
        "## Example 2\n\nInput:\n```\n\n```\nOutput:\n```\n4\n```\n\n"
        "## Note\n\n$n$ is\nsmall"
    )


def problem(id: str, **changes: Any) -> Row:
    """Build a row with complete tests."""
    row: Row = dict.fromkeys(module._COLUMNS)
    row |= {"id": id, "contest_id": id.split("/")[0], "title": "T", "description": f"Do {id}.", "executable": True}
    return {**row, "official_tests": [{"input": "1", "output": "2"}], "official_tests_complete": True, **changes}


def write_generated(folder: Path, contest: int, tests: list[tuple[str, str]]) -> None:
    path = folder / f"generated_tests/test_cases_{contest:04d}.parquet"
    path.parent.mkdir(exist_ok=True)
    rows = [{"problem_id": id, "test_case_i": i, "input": text, "output": "0"} for i, (id, text) in enumerate(tests)]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": None}, "column 'id' is empty"),
        ({"description": " "}, "column 'description' is empty"),
        ({"official_tests": []}, "its official_tests are incomplete .* it has no generated_tests"),
        ({"official_tests_complete": None}, "its official_tests are incomplete"),
        ({"official_tests_complete": False, "generated_tests": 0}, "its official_tests are incomplete"),
        ({"official_tests": [{"input": "1", "output": None}]}, "test 1 of official_tests lacks its input or"),
        ({"official_tests_complete": False, "generated_tests": 2, "contest_id": "gym"}, "contest_id is 'gym'"),
        ({"time_limit": -1.0}, "limits.time must be above 0"),
        ({"input_mode": "mouse"}, "input_mode is 'mouse'"),
    ],
)
def test_incomplete_rows_are_dropped(tmp_path: Path, changes: Row, reason: str) -> None:
    rows = [problem(f"{number}/A") for number in range(30)]
    rows[4] |= changes
    task = Codeforces(jsonl(tmp_path / "q.jsonl", rows), sizes=None, languages=("cpp",))
    assert len(task._all) == 29
    [(where, why)] = task.dropped
    assert where.endswith("row 5") and re.match(reason, why)


def test_a_cut_test_is_never_used(tmp_path: Path) -> None:
    pairs = (("1 2 3...", "6"), ("1\r\n", "1"), ("2", "1 1 1...\n"), (None, "1"), ("...#", "ok"))
    official = [{"input": text, "output": out} for text, out in pairs]
    rows = [
        problem("7/A", official_tests=official, official_tests_complete=False, generated_tests=2),
        problem("8/A", official_tests=[{"input": "..\n..", "output": "..."}]),  # all there: dots are dots
    ]
    write_generated(tmp_path, 7, [("7/A", "5\r\n6\r\n"), ("7/B", "x"), ("7/A", "7")])
    task = Codeforces(jsonl(tmp_path / "q.jsonl", rows), sizes=None, languages=("python",))
    expected = (("1\n", "1"), ("...#", "ok"), ("5\n6\n", "0"), ("7", "0"))
    tests = tuple(StdioTest(*test) for test in expected), (StdioTest("..\n..", "..."),)
    assert tuple(task.tests(question) for _, question in task._all) == tests


def test_a_changed_schema_names_the_column(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(repository, folder)
    rename_column(folder / "verifiable", "editorial", "renamed")  # it is not read
    assert task_of(folder)._all == task_of(repository)._all
    for column in ("official_tests_complete", "aliases"):  # from the last to the first that is checked
        rename_column(folder / "verifiable", column, f"other {column}")
        with pytest.raises(ValueError, match=rf"task.path: .*changed.* has no column '{column}'; it has \["):
            task_of(folder).questions("eval", 1)


def test_a_family_is_in_one_split_whatever_the_seed(repository: Path) -> None:
    for sizes in (None, *(Sizes(30, 30, 12, seed) for seed in range(8))):
        task = task_of(repository, sizes=sizes)
        splits: dict[str, set[str]] = {}
        for split, question in task._all:
            splits.setdefault(question.meta["problem"], set()).add(split)
        assert all(len(found) == 1 for found in splits.values()), "both languages"
        assert splits["907/A"] == splits["908/C"] and splits["909/A"] == splits["910/B"], "joined problems"
        if sizes is not None:
            assert 12 <= len(task.questions("eval", None)) <= 15


def test_families_join_aliases_and_equal_statements(tmp_path: Path) -> None:
    """Covers aliases in either direction, via a missing or an excluded problem, and equal statements."""
    aliases = {"9/A": ["1/A"], "1/A": None, "2/A": ["77/Z"], "3/A": ["88/Z"], "77/Z": ["88/Z"], "4/A": None}
    aliases |= {"5/A": None, "6/A": ["5/A"], "10/A": None}
    changes = {"77/Z": {"interaction_format": "asks"}, "5/A": {"description": "Do 4/A."}}
    rows = [problem(id, aliases=names, **changes.get(id, {})) for id, names in aliases.items()]
    families: dict[str, set[str]] = {}
    for _, question in Codeforces(jsonl(tmp_path / "q.jsonl", rows), sizes=None)._all:
        families.setdefault(question.family, set()).add(question.meta["problem"])
    assert sorted(map(sorted, families.values())) == [["1/A", "9/A"], ["10/A"], ["2/A", "3/A"], ["4/A", "6/A"]]
    again = Codeforces(jsonl(tmp_path / "r.jsonl", rows[::-1]), sizes=None)
    assert {q.family for _, q in again._all} == {*families}, "the order of the rows names no family"


def test_a_problem_keeps_its_split_in_every_choice_of_languages(repository: Path) -> None:
    both = {question.id: split for split, question in task_of(repository)._all}
    alone = (task_of(repository, languages=(language,))._all for language in LANGUAGES)
    assert both == {question.id: split for found in alone for split, question in found}


def test_invalid_languages_are_refused() -> None:
    invalid: list[Any] = [(), ("rust",), ("cpp", "cpp")]
    for languages in invalid:
        with pytest.raises(ValueError, match="task.languages must name one or more of .*'cpp', 'python'.*each once"):
            Codeforces(languages=languages)


def test_only_needed_test_files_are_downloaded(repository: Path, hub_files: Mock) -> None:
    task = task_of(repository)
    need = {"902/B": "0902", "42/A": "0042"}
    for split in SPLITS:
        questions = task.ungraded_questions(split, None)
        places = [i for i, q in enumerate(questions) if q.meta["problem"] in need]
        before = places[0] if places else None
        task.questions(split, before)
        hub_files.assert_not_called()
        if before is not None:
            task.questions(split, before + 1)
            task.questions(split, before + 1)  # a present file is not requested again
            expected = f"generated_tests/test_cases_{need[questions[before].meta['problem']]}.parquet"
            hub_files.assert_called_once_with(task.path, [expected])
            hub_files.reset_mock()


def test_tests_are_read_when_grading(repository: Path, hub_files: Mock) -> None:
    task = task_of(repository)
    two = [q for _, q in task._all if q.meta["problem"] == "902/B"]
    assert task._cached_tests.cache_info().misses == 0
    answers = [(q, f"```{q.meta['language']}\ncorrect\n```") for q in two]
    assert [verdict.reward for verdict in task.verify_all([*answers, *answers])] == [1] * 4
    info = task._cached_tests.cache_info()
    assert (info.misses, info.currsize, info.maxsize) == (1, 1, 8), "both languages have the same tests"
    hub_files.assert_called_once_with(task.path, ["generated_tests/test_cases_0902.parquet"])
    fake: Any = task._sandbox
    assert len({id(submission.tests) for submission in fake.asked[0]}) == 1, "tests are sent once"


def with_generated(folder: Path, num: int, lacking: Sequence[int]) -> str:
    """Write a file of problems, and beside it their tests, without those of `lacking`."""
    incomplete = {"official_tests": [], "official_tests_complete": False, "generated_tests": 1}
    for number in range(1, num + 1):
        write_generated(folder, number, [(f"{number}/B" if number in lacking else f"{number}/A", "1")])
    return jsonl(folder / "q.jsonl", [problem(f"{number}/A", **incomplete) for number in range(1, num + 1)])


def test_missing_tests_and_missing_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Problems missing from their file are dropped; a missing file is an error."""
    path = with_generated(tmp_path, 60, lacking=(17,))
    task = Codeforces({"eval": path}, sizes=None, languages=("cpp",))
    with caplog.at_level(logging.WARNING):
        questions = task.questions("eval", 30)
    assert [q.meta["problem"] for q in questions] == [f"{number}/A" for number in range(1, 32) if number != 17]
    assert task.dropped == [(f"{path}: row 17", "the file of its contest has no generated tests of it")]
    assert "left out 1 of 30 questions of split 'eval'" in caplog.text
    assert len(task.questions("eval", None)) == 59
    path = with_generated(tmp_path, 60, lacking=(17, 18, 20, 24))
    with pytest.raises(ValueError, match=r"4 of 30 questions .*its contest has no generated tests.*max_dropped_share"):
        Codeforces({"eval": path}, sizes=None, languages=("cpp",)).questions("eval", 30)
    (tmp_path / "generated_tests/test_cases_0003.parquet").unlink()
    task = Codeforces({"eval": path}, sizes=None)
    assert len(task.questions("eval", 4)) == 4
    with pytest.raises(FileNotFoundError, match=r"task.path: no file .*generated_tests/test_cases_0003.parquet"):
        task.questions("eval", 5)


def test_in_a_config(repository: Path) -> None:
    path, sizes = {"id": str(repository), "config": "verifiable"}, {"phase1": 10, "phase2": 10, "eval": 5}
    options = {"languages": ["python"], "limits": {"processes": 8}}
    task = from_config("sdzero.tasks.Codeforces", path=path, sizes=sizes, **options)
    assert [len(task.questions(split, None)) for split in SPLITS] == [10, 10, 5]
    assert task.limits == Limits(processes=8)
