"""Codeforces against an independent, slow reader of the made-up repository."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdzero.graders.sandbox.types import Limits, StdioTest
from sdzero.tasks import Code, Codeforces
from sdzero.tasks import codeforces as module
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.splits import Sizes
from sdzero.types import Question, Split
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
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the file names of each request to the repository."""
    calls: list[list[str]] = []
    real = module.hub_files

    def hub_files(source: HubDataset, names: Sequence[str]) -> list[Path]:
        calls.append([*names])
        return real(source, names)

    monkeypatch.setattr(module, "hub_files", hub_files)
    return calls


def task_of(repository: Path, config: str = "verifiable", **options: Any) -> Codeforces:
    given = {"sizes": None, "max_dropped_share": 0.2, **options}
    return Codeforces(HubDataset(str(repository), config=config), **given)


def published(repository: Path, config: str) -> list[Row]:
    folder = {"default": "data"}.get(config, config)
    return [row for file in sorted((repository / folder).glob("train-*")) for row in pq.read_table(file).to_pylist()]


def slow_reading(repository: Path, rows: list[Row]) -> tuple[dict[str, list[tuple[str, str]]], dict[str, str]]:
    """Return the tests by problem, and the reason of exclusion by excluded problem."""
    asked: dict[str, list[tuple[str, str]]] = {}
    left_out: dict[str, str] = {}
    for row in rows:
        tests = [(test["input"], test["output"]) for test in row["official_tests"] or []]
        if row["interaction_format"]:
            left_out[row["id"]] = "interactive"
            continue
        if not row["executable"]:
            left_out[row["id"]] = "executable"
            continue
        if not row["official_tests_complete"]:
            tests = [pair for pair in tests if not pair[0].endswith("...") and not pair[1].endswith("...")]
            contest, _ = row["id"].split("/")
            for file in (repository / "generated_tests").iterdir():
                if int(file.stem.split("_")[-1]) == int(contest):
                    for test in pq.read_table(file).to_pylist():
                        if test["problem_id"] == row["id"]:
                            tests.append((test["input"], test["output"]))
            if row["generated_tests"] == 0:
                left_out[row["id"]] = "official_tests_complete"
                continue
        asked[row["id"]] = [(one.replace("\r", ""), other.replace("\r", "")) for one, other in tests]
    return asked, left_out


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["verifiable", "default"])
def test_questions_and_tests_are_those_of_a_slow_reading(repository: Path, config: str) -> None:
    rows = published(repository, config)
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
        for column in ("title", "input_format", "output_format"):
            assert row[column] in question.text
        assert question.meta["rating"] == row["rating"]
        assert len(json.dumps(dict(question.meta))) < 500, "each trace carries it"
    set_aside = [why for why in left_out.values() if why != "official_tests_complete"]
    assert task.set_aside.total() == len(set_aside)
    assert [why for _, why in task.dropped] == [
        "its official_tests are incomplete (official_tests_complete), and it has no generated_tests"
    ] * (len(left_out) - len(set_aside))
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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": None}, "column 'id' is empty"),
        ({"description": " "}, "column 'description' is empty"),
        ({"official_tests": []}, "its official_tests are incomplete .* it has no generated_tests"),
        ({"official_tests": None}, "its official_tests are incomplete"),
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
    assert where.endswith("row 5")
    assert re.match(reason, why)


def test_a_cut_test_is_never_used(tmp_path: Path) -> None:
    official = [
        {"input": "1 2 3...", "output": "6"},
        {"input": "1\r\n", "output": "1"},
        {"input": "2", "output": "1 1 1...\n"},
        {"input": None, "output": "1"},
        {"input": "...#", "output": "ok"},
    ]
    rows = [
        problem("7/A", official_tests=official, official_tests_complete=False, generated_tests=2),
        problem("8/A", official_tests=[{"input": "..\n..", "output": "..."}]),  # all there: dots are dots
    ]
    path = jsonl(tmp_path / "q.jsonl", rows)
    write_generated(
        tmp_path / "generated_tests/test_cases_0007.parquet", [("7/A", "5\r\n6\r\n"), ("7/B", "x"), ("7/A", "7")]
    )
    task = Codeforces(path, sizes=None, languages=("python",))
    one, other = (question for _, question in task._all)
    assert task.tests(one) == tuple(
        StdioTest(text, out) for text, out in (("1\n", "1"), ("...#", "ok"), ("5\n6\n", "0"), ("7", "0"))
    )
    assert task.tests(other) == (StdioTest("..\n..", "..."),)


def write_generated(path: Path, tests: list[tuple[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = [{"problem_id": id, "test_case_i": i, "input": text, "output": "0"} for i, (id, text) in enumerate(tests)]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("column", ["editorial", "generated_checker", "official_tests_complete", "aliases"])
def test_a_changed_schema_names_the_column(tmp_path: Path, repository: Path, column: str) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(repository, folder)
    questions = task_of(folder)._all
    rename_column(folder / "verifiable", column, "renamed")
    if column == "editorial":  # it is not read
        assert task_of(folder)._all == questions
        return
    with pytest.raises(ValueError, match=rf"task.path: .*changed.* has no column '{column}'; it has \["):
        task_of(folder).questions("eval", 1)


# --- splits ---------------------------------------------------------------------------------------


def test_a_family_is_in_one_split_whatever_the_seed(repository: Path) -> None:
    joined = [{"907/A", "908/C"}, {"909/A", "910/B"}]
    for sizes in (None, *(Sizes(30, 30, 12, seed) for seed in range(8))):
        task = task_of(repository, sizes=sizes)
        split_of: dict[str, set[str]] = {}
        for split in SPLITS:
            for question in task.questions(split, None):
                split_of.setdefault(question.meta["problem"], set()).add(split)
        assert all(len(splits) == 1 for splits in split_of.values()), "both languages"
        for one, other in joined:
            assert split_of[one] == split_of[other]
        if sizes is not None:
            assert 12 <= len(task.questions("eval", None)) <= 15


def test_families_join_aliases_and_equal_statements(tmp_path: Path) -> None:
    """Covers aliases in either direction, via a missing or an excluded problem, and equal statements."""
    rows = [
        problem("9/A", aliases=["1/A"]),
        problem("1/A"),
        problem("2/A", aliases=["77/Z"]),
        problem("3/A", aliases=["88/Z"]),
        problem("77/Z", aliases=["88/Z"], interaction_format="asks"),
        problem("4/A"),
        problem("5/A", description="Do 4/A."),
        problem("6/A", aliases=["5/A"]),
        problem("10/A"),
    ]
    task = Codeforces(jsonl(tmp_path / "q.jsonl", rows), sizes=None)
    families: dict[str, set[str]] = {}
    for _, question in task._all:
        families.setdefault(question.family, set()).add(question.meta["problem"])
    assert sorted(map(sorted, families.values())) == [["1/A", "9/A"], ["10/A"], ["2/A", "3/A"], ["4/A", "6/A"]]
    again = Codeforces(jsonl(tmp_path / "r.jsonl", rows[::-1]), sizes=None)
    assert {q.family for _, q in again._all} == {*families}, "the order of the rows names no family"


def test_a_problem_keeps_its_split_in_every_choice_of_languages(repository: Path) -> None:
    both = {question.id: split for split, question in task_of(repository)._all}
    for language in LANGUAGES:
        alone = {question.id: split for split, question in task_of(repository, languages=(language,))._all}
        assert alone == {id: split for id, split in both.items() if id.endswith(language)}


@pytest.mark.parametrize("languages", [(), ("rust",), ("cpp", "cpp")])
def test_invalid_languages_are_refused(languages: Any) -> None:
    with pytest.raises(ValueError, match="task.languages must name one or more of .*'cpp', 'python'.*each once"):
        Codeforces(languages=languages)


# --- files of generated tests ---------------------------------------------------------------------


def test_only_needed_test_files_are_downloaded(repository: Path, fetched: list[list[str]]) -> None:
    task = task_of(repository)
    for split in SPLITS:
        task.ungraded_questions(split, None)
    assert fetched == []
    need = {"902/B": "0902", "42/A": "0042"}
    order: dict[Split, list[Question]] = {split: task.ungraded_questions(split, None) for split in SPLITS}
    for split, questions in order.items():
        place = next((i for i, q in enumerate(questions) if q.meta["problem"] in need), None)
        if place is None:
            task.questions(split, None)
            assert fetched == []
            continue
        task.questions(split, place)
        assert fetched == []
        task.questions(split, place + 1)
        expected = f"generated_tests/test_cases_{need[questions[place].meta['problem']]}.parquet"
        assert fetched == [[expected]]
        task.questions(split, place + 1)
        assert len(fetched) == 1, "what is here is not asked for again"
        fetched.clear()


def test_tests_are_read_when_grading(repository: Path, fetched: list[list[str]]) -> None:
    task = task_of(repository)
    questions = [question for split in SPLITS for question in task.ungraded_questions(split, None)]
    assert task._cached_tests.cache_info().misses == 0
    two = [q for q in questions if q.meta["problem"] == "902/B"]
    answers = [(q, f"```{q.meta['language']}\ncorrect\n```") for q in two]
    assert [verdict.reward for verdict in task.verify_all([*answers, *answers])] == [1] * 4
    info = task._cached_tests.cache_info()
    assert (info.misses, info.currsize, info.maxsize) == (1, 1, 8), "both languages have the same tests"
    assert fetched == [["generated_tests/test_cases_0902.parquet"]]
    fake: Any = task._sandbox
    [asked] = fake.asked
    assert len({id(submission.tests) for submission in asked}) == 1, "tests are sent once"


def with_generated(folder: Path, num: int, lacking: Sequence[int]) -> str:
    """Write a file of problems, and beside it their tests, without those of `lacking`."""
    rows = [
        problem(f"{number}/A", official_tests=[], official_tests_complete=False, generated_tests=1)
        for number in range(1, num + 1)
    ]
    for number in range(1, num + 1):
        tests = [(f"{number}/B" if number in lacking else f"{number}/A", "1")]
        write_generated(folder / f"generated_tests/test_cases_{number:04d}.parquet", tests)
    return jsonl(folder / "q.jsonl", rows)


def test_problems_missing_from_their_file_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_missing_test_file_is_named(tmp_path: Path) -> None:
    path = with_generated(tmp_path, 6, ())
    (tmp_path / "generated_tests/test_cases_0003.parquet").unlink()
    task = Codeforces({"eval": path}, sizes=None)
    assert len(task.questions("eval", 4)) == 4
    with pytest.raises(FileNotFoundError, match=r"task.path: no file .*generated_tests/test_cases_0003.parquet"):
        task.questions("eval", 5)


# --- in a config ----------------------------------------------------------------------------------


def test_in_a_config(repository: Path) -> None:
    task = from_config(
        "sdzero.tasks.Codeforces",
        path={"id": str(repository), "config": "verifiable"},
        languages=["python"],
        sizes={"phase1": 10, "phase2": 10, "eval": 5},
        limits={"processes": 8},
    )
    assert isinstance(task, Code)
    assert [len(task.questions(split, None)) for split in SPLITS] == [10, 10, 5]
    assert task.limits == Limits(processes=8)


def test_the_defaults_are_the_papers() -> None:
    task = Codeforces()
    assert isinstance(task.path, HubDataset)
    assert (task.path.id, task.path.config, task.path.split) == ("open-r1/codeforces", "verifiable", "train")
    assert (task.languages, task.sizes) == (LANGUAGES, Sizes(10_000, 9_000, 1_000))
