"""Hub data sets, read from a local server with the Hub's API: downloads, caching and errors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdzero.tasks.hub import HubDataset, hub_files
from sdzero.tasks.sources import read
from support.fake_hub import FakeHub
from support.fake_hub import hub as hub  # the fixture
from support.fixtures.make import make
from support.fixtures.mathematics import AIME25, COUNTDOWN, HMMT, OPENR1, openr1_row
from support.fixtures.programs import CODEFORCES
from support.fixtures.repository import rename_column
from support.rows import collect_config
from support.runs import exit_code, refusal, sdzero

NOBODYS = "0" * 40
COLUMNS = ["problem", "answer"]


def gets(hub: FakeHub) -> list[str]:
    """Return the requests for file contents."""
    return [request for request in hub.requests if request.startswith("GET ") and "/resolve/" in request]


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_the_rows_of_a_pinned_revision(hub: FakeHub, tmp_path: Path, streaming: bool) -> None:
    folder = make(tmp_path, HMMT)
    first = hub.publish(HMMT, folder)
    rename_column(folder, "answer", "gold")
    second = hub.publish(HMMT, folder)
    old = read(HubDataset(HMMT, revision=first, streaming=streaming), COLUMNS)
    new = read(HubDataset(HMMT, revision=second, streaming=streaming), ["problem", "gold"])
    assert len(old) == 30 and [row["answer"] for row in old] == [row["gold"] for row in new]
    assert [row["problem_idx"] for row in old] == [*range(1, 31)]


def test_the_newest_revision_is_named(hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commit = hub.publish(HMMT, make(tmp_path, HMMT))
    assert len(read(HubDataset(HMMT), COLUMNS)) == 30
    assert f"{HMMT}: the newest revision is {commit}: set task.path.revision to pin it" in capfd.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_wanted_columns_are_read(hub: FakeHub, tmp_path: Path, streaming: bool) -> None:
    commit = hub.publish(OPENR1, make(tmp_path, OPENR1))
    source = HubDataset(OPENR1, revision=commit, columns=("source",), streaming=streaming)
    rows = read(source, COLUMNS)
    assert rows == [{name: openr1_row(n)[name] for name in (*COLUMNS, "source")} for n in range(40)]


def test_columns_of_a_file_of_json(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.publish(AIME25, make(tmp_path, AIME25))
    for streaming in (False, True):
        rows = read(HubDataset(AIME25, "test", revision=commit, columns=(), streaming=streaming), COLUMNS)
        assert len(rows) == 30 and {*rows[0]} == {*COLUMNS}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_cached(hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str], streaming: bool) -> None:
    """The first read prints the size; the second sends no request."""
    commit = hub.publish(OPENR1, make(tmp_path, OPENR1))
    source = HubDataset(OPENR1, revision=commit, columns=("source",), streaming=streaming)
    rows = read(source, COLUMNS)
    said = capfd.readouterr().err
    part = ", only columns problem, answer, source" if streaming else ""
    verb = "streaming" if streaming else "downloading"
    assert f"{verb} {OPENR1} (train): 2 files, 0.0 MB{part}" in said
    hub.forget()
    assert read(source, COLUMNS) == rows and gets(hub) == []
    assert "2 files" not in capfd.readouterr().err


def test_streaming_reads_less_than_the_whole(hub: FakeHub, tmp_path: Path) -> None:
    """Readers request 5 MB at a time, so the unread generations must be much larger."""
    folder = make(tmp_path, OPENR1)
    first, second = sorted((folder / "data").iterdir())
    table = pq.read_table(first)
    column = table.column_names.index("generations")
    long = pa.array([[random.Random(row).randbytes(500_000).hex()] for row in range(len(table))])
    pq.write_table(table.set_column(column, table.field(column), long), first)
    whole = first.stat().st_size + second.stat().st_size
    commit = hub.publish(OPENR1, folder)
    rows = read(HubDataset(OPENR1, revision=commit, columns=("source",), streaming=True), COLUMNS)
    assert len(rows) == 40 and whole > 10_000_000 and hub.num_bytes < whole / 2


def test_cache_depends_on_the_columns(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.publish(HMMT, make(tmp_path, HMMT))
    for columns in (["problem"], ["problem", "answer"]):
        rows = read(HubDataset(HMMT, revision=commit, columns=(), streaming=True), columns)
        assert {*rows[0]} == {*columns}


def test_files_of_a_repository(hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path, CODEFORCES)
    source = HubDataset(CODEFORCES, revision=hub.publish(CODEFORCES, folder))
    names = sorted(str(path.relative_to(folder)) for path in (folder / "generated_tests").iterdir())[:2]
    paths = hub_files(source, names)
    assert [path.read_bytes() for path in paths] == [(folder / name).read_bytes() for name in names]
    assert f"downloading 2 files of {CODEFORCES}: 0.0 MB" in capfd.readouterr().err
    hub.forget()
    assert hub_files(source, names) == paths and hub.requests == []
    with pytest.raises(
        FileNotFoundError, match=rf"task.path: {CODEFORCES} .* is unavailable at revision {source.revision}"
    ):
        hub_files(source, ["generated_tests/none.parquet"])


def test_a_folder_laid_out_like_a_repository(tmp_path: Path) -> None:
    folder = make(tmp_path, OPENR1)
    assert len(read(HubDataset(str(folder)), COLUMNS)) == 40
    assert len(read(HubDataset(str(folder), "extended", "all", columns=()), COLUMNS)) == 21
    assert hub_files(HubDataset(str(folder)), ["README.md"]) == [folder / "README.md"]
    with pytest.raises(FileNotFoundError, match="task.path: no file .*none.parquet"):
        hub_files(HubDataset(str(folder)), ["none.parquet"])


# --- what is refused, as the command says it ------------------------------------------------------


def config_of(tmp_path: Path, path: dict[str, Any]) -> Path:
    return collect_config(tmp_path, "sdzero.tasks.Math", path=path, max_dropped_share=0.2)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"revision": NOBODYS}, f"task.path: {OPENR1} (train) is unavailable at revision {NOBODYS}: "),
        ({"revision": "v9"}, f"task.path: {OPENR1} (train) is unavailable at revision v9: "),
        ({"id": "open-r1/none"}, "task.path: open-r1/none (train) is unavailable at revision "),
        ({"config": "extnded"}, f"task.path.config: {OPENR1}: BuilderConfig 'extnded' not found. Available: ['all', "),
        ({"split": "test"}, f"task.path.split: {OPENR1} has no split 'test'; it has ['train']"),
        ({"columns": ["gold"]}, f"{OPENR1} (train) has no column 'gold'; it has ['answer', 'correctness_count', "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_are_one_line(
    hub: FakeHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    said: str,
    streaming: bool,
) -> None:
    commit = hub.publish(OPENR1, make(tmp_path, OPENR1))
    path = {"id": OPENR1, "revision": commit, "streaming": streaming, **change}
    assert said in refusal(capsys, monkeypatch, "collect", "--config", config_of(tmp_path, path))


def test_a_schema_that_changed_names_the_column(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, HMMT)
    rename_column(folder, "answer", "gold")
    path = {"id": HMMT, "revision": hub.publish(HMMT, folder)}
    line = refusal(capsys, monkeypatch, "collect", "--config", config_of(tmp_path, path))
    expected = f"task.answer_column: {HMMT} (train) has no column 'answer'; it has ['gold', 'problem', 'problem_idx'"
    assert expected in line


@pytest.mark.parametrize("streaming", [False, True])
def test_unreachable_hub(
    hub: FakeHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    streaming: bool,
) -> None:
    """Simulates a machine without a network."""
    hub.close()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # a file is asked for six times, over 23 seconds
    path = {"id": OPENR1, "revision": NOBODYS, "streaming": streaming}
    said = refusal(capsys, monkeypatch, "collect", "--config", config_of(tmp_path, path))
    assert f"task.path: {OPENR1} (train) is unavailable at revision {NOBODYS}: " in said
    assert "(offline, it must be in the cache, HF_HOME" in said


def test_second_process_reads_the_cache_offline(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run downloads; the next one, offline, reads the cache."""
    commit = hub.publish(COUNTDOWN, make(tmp_path, COUNTDOWN))
    path = {"id": COUNTDOWN, "revision": commit, "columns": [], "streaming": True}
    task = {"class_path": "sdzero.tasks.Countdown", "init_args": {"path": path}}
    (tmp_path / "recipe.yaml").write_text(
        "stages: {base: {trains: false}, collect: {command: collect}, self_distill: {}}"
    )
    (tmp_path / "collect.yaml").write_text(json.dumps({"task": task}))
    for name in ("self_distill", "eval"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"data": {"init_args": {"task": task}}}))
    assert exit_code(monkeypatch, "decontaminate", tmp_path) == 0
    first = capsys.readouterr()
    assert f"streaming {COUNTDOWN} (train): 1 files, 0.0 MB" in first.err
    assert len(gets(hub)) > 0
    hub.forget()
    again = sdzero("decontaminate", tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == first.out and hub.requests == [], again.stderr
