"""Journal of generate calls and file of traces: partial calls, cut and damaged lines, full disks."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.data import journal as journal_module
from sdzero.data.journal import CallJournal
from sdzero.data.trace_file import read_traces, write_traces
from sdzero.engines.base import TokenChunk
from sdzero.types import Question, Trace
from sdzero.utils.files import read_jsonl
from sdzero.utils.row_checksum import dumps_with_checksum, verify_checksum


def test_each_step_is_flushed_and_on_disk_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, synced = [100.0], []
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(now[0]))
    journal = CallJournal(tmp_path)
    with journal.append_partial("g", "f") as write:
        for step in range(1, 101):
            now[0] += 0.03125
            write({0: TokenChunk((step,), (-0.5,)), 7: TokenChunk((), ())})
            assert len((tmp_path / "g.partial").read_text().splitlines()) == 1 + step
    assert journal.read_partial("g", "f") == {0: TokenChunk(tuple(range(1, 101)), (-0.5,) * 100), 7: TokenChunk()}
    assert synced == [101.0, 102.0, 103.0]


@pytest.mark.parametrize("num_bytes", [0, 5])
def test_a_file_whose_content_was_lost_is_empty(tmp_path: Path, num_bytes: int) -> None:
    journal = CallJournal(tmp_path)
    with journal.append_partial("g", "f") as write:
        write({0: TokenChunk((3,), (-0.5,))})
    with (tmp_path / "g.partial").open("r+b") as file:
        file.truncate(num_bytes)
    assert journal.read_partial("g", "f") == {} and not (tmp_path / "g.partial").exists()


def test_delete_removes_only_the_groups_it_names(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    for group in ("train-000001", "train-000002", "eval-000001-00000"):
        journal.start(group, "0")
        journal.put(group, "0", "f", [{"text": group}])
    journal.delete(lambda group: group < "train-000002" and group.startswith("train"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["calls.log", "eval-000001-00000.jsonl", "train-000002.jsonl"]
    assert journal.get("train-000001", "0", "f") is None
    assert journal.get("train-000002", "0", "f") == [{"text": "train-000002"}]
    assert journal.get("train-000002", "0", "another") is None and journal.get("train-000002", "1", "f") is None
    assert journal.num_started == 3 and CallJournal(tmp_path / "new").num_started == 0


def test_the_latest_of_two_calls_of_one_name_counts(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    journal.put("g", "0", "old", [{"text": "old"}])
    journal.put("g", "0", "new", [{"text": "new"}])
    for one in (journal, CallJournal(tmp_path)):
        assert one.get("g", "0", "new") == [{"text": "new"}] and one.get("g", "0", "old") is None


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3), max_size=4), st.data())
def test_a_cut_file_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = rows[: whole[:cut].count(b"\n")]
    assert read_jsonl(path) == kept == read_jsonl(path)


def test_a_cut_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a":')
    with caplog.at_level(logging.WARNING):
        assert read_jsonl(path) == read_jsonl(path) == [{"a": 1}]
    assert caplog.messages == [f"{path}: dropped an incomplete last line (5 bytes)"]


@pytest.mark.parametrize("line", [b'{"a": 1', b"\x00\x00", b"\xff\xfe", b"[]", b"null"])
def test_a_damaged_line_is_an_error(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 2 is .*: remove the file to have it created again"):
        read_jsonl(path)


def flips(raw: bytes) -> Iterator[bytes]:
    """The file with one bit flipped; several bits of every byte."""
    for bit in range(0, 8 * len(raw), 3):
        yield raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


def test_no_bit_that_flips_in_a_journal_changes_a_response(tmp_path: Path) -> None:
    """Most would leave rows of JSON that read well. Only the last line's end may go: the call is made again."""
    row = {"token_ids": [5, 16], "logprobs": [-0.25, -1e-05], "text": "7", "finish_reason": "stop"}
    journal = CallJournal(tmp_path)
    journal.put("g", "0", "f", [row])
    file = tmp_path / "g.jsonl"
    errors = Counter()
    for damaged in flips(file.read_bytes()):
        file.write_bytes(damaged)
        try:
            kept = CallJournal(tmp_path).get("g", "0", "f")
        except ValueError as error:
            assert str(file) in str(error) and "remove the file to have it created again" in str(error)
            errors["crc32" in str(error)] += 1
        else:
            assert kept == [row] or (kept is None and not damaged.endswith(b"\n"))
    assert errors[True] > 150 and errors[False] > 150  # many are found by the checksum alone


def test_no_bit_that_flips_in_the_traces_changes_one(tmp_path: Path) -> None:
    path, traces = tmp_path / "traces.jsonl", [Trace(Question("q", "1+1=", "2"), (1, 2), (3,), (4,), (5, 6), 1)]
    write_traces(path, traces)
    for damaged in flips(path.read_bytes()):
        path.write_bytes(damaged)
        try:
            assert read_traces(path) == traces
        except ValueError as error:
            assert f"{path}: line" in str(error)


def test_rows_without_checksums_are_read(tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text('{"key": "0", "fingerprint": "f", "responses": [1]}\n')
    assert CallJournal(tmp_path).get("g", "0", "f") == [1]
    row = {"a": (1, 2.5, float("inf"), "é"), 3: None}
    assert verify_checksum(json.loads(dumps_with_checksum(row))) == {"a": [1, 2.5, float("inf"), "é"], "3": None}


# --- files ----------------------------------------------------------------------------------------


def test_traces_survive_the_file(tmp_path: Path) -> None:
    question = Question("q/é", "1+1=\n", "2", {"n": 1})
    traces = [Trace(question, (1, 2), (3,), (4,), (5, 6), 1), Trace(question, (1,), (), (), (5,), None)]
    write_traces(tmp_path / "traces.jsonl", traces)
    assert read_traces(tmp_path / "traces.jsonl") == traces
    assert [f.name for f in tmp_path.iterdir()] == ["traces.jsonl"]


def test_a_trace_without_a_field_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text('{"question": {}, "prompt_ids": []}\n')
    with pytest.raises(ValueError, match="line 1 lacks 'init_ids': it is not a trace"):
        read_traces(tmp_path / "traces.jsonl")
