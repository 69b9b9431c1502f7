"""LiveCodeBench against an independent reader of the made-up files, which unpickles their tests."""

from __future__ import annotations

import base64
import builtins
import json
import pickle
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from sdzero.graders.sandbox.types import CallTest, StdioTest
from sdzero.tasks import LiveCodeBench, Task
from sdzero.tasks.hub import HubDataset
from support.fake_sandbox import fake_sandbox  # noqa: F401 - a fixture
from support.fixtures.livecodebench import (
    FILES,
    LIVECODEBENCH,
    LIVECODEBENCH_ODD,
    LIVECODEBENCH_PARQUET,
    PER_FILE,
    packed,
    question,
)
from support.fixtures.make import make
from support.rows import jsonl

Row = dict[str, Any]


pytestmark = pytest.mark.usefixtures("fake_sandbox")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("livecodebench"), LIVECODEBENCH)


def task_of(repository: Path, version: Any = "v6", **options: Any) -> LiveCodeBench:
    return LiveCodeBench(HubDataset(str(repository)), version, **options)


def slow_tests(row: Row) -> list[StdioTest | CallTest]:
    tests = json.loads(row["public_test_cases"])
    try:
        tests += json.loads(row["private_test_cases"])
    except ValueError:
        tests += json.loads(pickle.loads(zlib.decompress(base64.b64decode(row["private_test_cases"]))))
    name = json.loads(row["metadata"]).get("func_name")
    if not name:
        return [StdioTest(test["input"], test["output"]) for test in tests]
    calls = [([json.loads(line) for line in test["input"].splitlines()], json.loads(test["output"])) for test in tests]
    return [CallTest(name, tuple(args), expected) for args, expected in calls]


@pytest.mark.parametrize("number", range(1, 7))
def test_version_selects_files(repository: Path, number: int) -> None:
    rows = [json.loads(line) for file in FILES[:number] for line in (repository / file).open()]
    assert len(rows) == number * PER_FILE
    task = task_of(repository, f"v{number}")
    questions = task.questions("eval", None)
    assert [q.id for q in questions] == [f"livecodebench/{row['question_id']}" for row in rows]
    for q, row in zip(questions, rows, strict=True):
        assert [*task.tests(q)] == slow_tests(row)
        submission = task._submissions[q.id]
        assert (submission.language, submission.compare, submission.limits.time) == ("python", "lines", 6.0)
        assert row["question_content"] in q.text and task.statement(q) == row["question_content"]
        assert q.meta["contest_date"] == row["contest_date"] and q.meta["platform"] == row["platform"]
        assert "tests" not in q.meta
    assert task.dropped == []
    with pytest.raises(ValueError, match="split 'phase1' of .* holds only 0"):
        task.questions("phase1", 1)
    assert {f"livecodebench/{id}" for id in LIVECODEBENCH_ODD} <= {q.id for q in questions}


def test_parquet_copy_is_equivalent(tmp_path: Path, repository: Path) -> None:
    copy = HubDataset(str(make(tmp_path, LIVECODEBENCH_PARQUET)), config="release_v3", split="test")
    one, other = LiveCodeBench(copy, None), task_of(repository, "v3")
    assert one.questions("eval", None) == other.questions("eval", None)
    assert one._packed == other._packed


@pytest.mark.parametrize(
    ("since", "until"),
    [("2024-01-08", None), (None, "2024-01-08"), ("2023-06-26", "2024-01-08"), ("2023-06-26", "2023-06-26")],
)
def test_dates_are_inclusive(repository: Path, since: str | None, until: str | None) -> None:
    days = {number: question(number)["contest_date"][:10] for number in range(36)}
    assert {"2024-01-08", "2023-06-26"} <= {*days.values()}
    wanted = [n for n, day in days.items() if (since is None or day >= since) and (until is None or day <= until)]
    task = task_of(repository, since=since, until=until)
    assert [q.id for q in task.questions("eval", None)] == [f"livecodebench/made_up_{number}" for number in wanted]
    assert task.set_aside.total() == 36 - len(wanted) and task.dropped == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"since": "last spring"}, "task.since must be a date such as 2024-08-01, or null, got 'last spring'"),
        ({"until": "2024-02-30"}, "task.until must be a date"),
        ({"since": "2024-05-02", "until": "2024-05-01"}, "task.since=2024-05-02 is later than task.until=2024-05-01"),
        ({"version": "v7"}, "task.version must be one of .*'v6'.*got 'v7'"),
        ({"path": "q.jsonl"}, "task.version selects files of the benchmark's own repository: set null for another"),
        ({"path": HubDataset("a/b", config="c")}, "task.version selects files"),
        ({"path": {"eval": HubDataset("a/b")}}, "task.version selects files"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LiveCodeBench(**options)


def test_prompt_text(repository: Path) -> None:
    one, other = (task_of(repository).questions("eval", None)[number] for number in (0, 5))
    assert one.text == (
        "### Question:\nMade up: print the sum of the numbers.\n\n"
        "### Format: Write a Python program that reads the input from standard input and writes the answer to standard "
        "output; do not run it on the examples. Give it in one block fenced like the one below.\n"
        "```python\n# YOUR CODE HERE\n```\n\n"
        "### Answer:"
    )
    assert other.text == (
        "### Question:\nMade up: write the function double.\n\n"
        "### Format: Complete the starter code below, and give all of it in one block fenced like it.\n"
        "```python\nclass Solution:\n    def double(self, a: int) -> int:\n```\n\n"
        "### Answer:"
    )


def test_programs_get_the_preamble(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "setrecursionlimit", lambda limit: None)  # of this process
    task = task_of(repository)
    [first, *_] = task.questions("eval", None)
    used = "from __future__ import annotations\nx: Nothing = deque([inf, gcd(4, 6)])\nprint(pow(2, 3, 5), math.pi, x)"
    program = task.program(first, f"```python\n{used}\n```")
    assert program is not None
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "program.py", "exec", dont_inherit=True), names)
    used = ("Counter", "List", "heappush", "bisect_left", "lru_cache", "accumulate", "ascii_lowercase", "datetime")
    assert {*used} <= {*names}
    for name in ("open", "pow", "compile", "abs", "chr"):
        assert names[name] is getattr(builtins, name), "what a module's star has hidden is there again"
    assert task.program(first, "no program") is None


# --- rows whose tests cannot be read --------------------------------------------------------------


def rows_of(num: int) -> list[Row]:
    return [question(2 * number) for number in range(num)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"private_test_cases": packed([{"input": "1", "output": "1"}])[:-9]}, "private_test_cases: "),
        (
            {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps("[1, 2"))).decode()},
            "private_test_cases: ",
        ),
        ({"private_test_cases": packed([{"input": 5, "output": "1"}])}, "private_test_cases: expected tests with"),
        ({"private_test_cases": None}, "private_test_cases is not a string"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "public_test_cases and private_test_cases are empty"),
        ({"public_test_cases": [{"input": "1", "output": "2"}]}, "public_test_cases is not a string"),
        ({"metadata": "func_name"}, "metadata: Expecting value"),
        ({"metadata": '{"func_name": "f"}', "private_test_cases": "[]"}, "test 1: Extra data"),
        ({"question_content": ""}, "column 'question_content' is empty"),
    ],
)
def test_rows_whose_tests_cannot_be_read_are_left_out_at_load(tmp_path: Path, changes: Row, reason: str) -> None:
    rows = rows_of(25)
    rows[4] |= changes
    task = LiveCodeBench(jsonl(tmp_path / "q.jsonl", rows), None)
    assert len(task.questions("eval", None)) == 24
    [(where, why)] = task.dropped
    assert where.endswith("row 5") and why.startswith(reason)


def test_invalid_date_matters_only_when_filtering_by_date(tmp_path: Path) -> None:
    rows = rows_of(25)
    rows[4]["contest_date"] = "spring"
    path = jsonl(tmp_path / "q.jsonl", rows)
    assert len(LiveCodeBench(path, None).questions("eval", None)) == 25
    task = LiveCodeBench(path, None, since="2020-01-01")
    assert len(task.questions("eval", None)) == 24
    assert "spring" in task.dropped[0][1]


def test_tests_stay_packed_until_grading(repository: Path) -> None:
    task = task_of(repository)
    questions = task.questions("eval", None)
    assert all(submission.tests == () for submission in task._submissions.values())
    assert task._packed[questions[4].id] == tuple(
        question(4)[column] for column in ("public_test_cases", "private_test_cases", "metadata")
    )
    assert task._rows == {}
    answers = [(q, f"```python\n{word}\n```") for q in questions for word in ("correct", "wrong")]
    assert [verdict.reward for verdict in task.verify_all(answers)] == [1, 0] * 36
    info = task._cached_tests.cache_info()
    assert (info.misses, info.currsize) == (36, 8)


def test_a_changed_repository_is_named(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(repository, folder)
    (folder / "test3.jsonl").unlink()
    assert len(task_of(folder, "v2").questions("eval", None)) == 12
    with pytest.raises(FileNotFoundError, match=r"task.path: no file .*changed/test3.jsonl"):
        task_of(folder, "v3").questions("eval", None)
    rows = [json.loads(line) for line in (folder / "test2.jsonl").open()]
    jsonl(folder / "test2.jsonl", [{"tests" if c == "metadata" else c: v for c, v in row.items()} for row in rows])
    with pytest.raises(ValueError, match=r"task.path: .*test2.jsonl has no column 'metadata'; it has \["):
        task_of(folder, "v2").questions("eval", None)


def test_in_a_config(repository: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    (repository / "task.yaml").write_text(  # dates without quotes
        "class_path: sdzero.tasks.LiveCodeBench\n"
        f"init_args: {{path: {{id: {repository}}}, version: v4, since: 2023-06-26, until: 2023-09-18}}\n"
    )
    task = parser.instantiate(parser.parse_args(["--task", str(repository / "task.yaml")])).task
    assert [q.id.rpartition("_")[2] for q in task.questions("eval", None)] == ["2", "3", "4", "5"]
