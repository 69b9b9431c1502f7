"""A disk that is full while a stage writes gives one line that names the place, whichever library was writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tensorboard.summary.writer.record_writer import RecordWriter

from sdzero.utils.disk_full import add_path_to_errors
from sdzero.utils.files import PARTIAL
from support.runs import SMOKE, refusal
from support.tiny_model import write_tiny_model


def fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: Path) -> str:
    """Output of one step of SelfDistill, with everything that writes at every step."""
    arguments = (
        *("fit", "--config", SMOKE / "self_distill.yaml", f"--trainer.default_root_dir={out}", "--trainer.max_steps=1"),
        *("--model.student.path=configs/tiny_model", "--model.student.weights=random", "--data.disjoint_from=null"),
        *("--trainer.val_check_interval=1", "--data.sampling.max_new_tokens=8", "--model.teacher=null"),
    )
    return refusal(capsys, monkeypatch, *arguments)


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Fail every flush of the atomic write of a file called `name`."""
    fsync = os.fsync

    def fail(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(f"/{name}{PARTIAL}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr("os.fsync", fail)


def test_journal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """/dev/full can be opened, but not written to."""
    log = tmp_path / "journal/rank0/calls.log"
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    said = fit(capsys, monkeypatch, tmp_path)
    assert f"No space left on device: '{tmp_path}'. Finished work is kept: free some space" in said


def test_samples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "samples/train-000000-rank0.jsonl"
    fill_disk(monkeypatch, file.name)
    said = fit(capsys, monkeypatch, tmp_path)
    assert f"No space left on device: '{file}'" in said and not file.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the writer's thread says it too
def test_curves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", write)
    said = fit(capsys, monkeypatch, tmp_path)
    assert f"No space left on device: '{tmp_path}'" in said


def test_the_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def export(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sdzero.callbacks.export_model.export", export)
    assert f"No space left on device: '{tmp_path}'" in fit(capsys, monkeypatch, tmp_path)


def test_traces(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill_disk(monkeypatch, "traces.jsonl")
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=1, hidden_size=32)
    arguments = ("--config", SMOKE / "collect.yaml", f"--student.path={model}", f"--out={tmp_path}")
    said = refusal(capsys, monkeypatch, "collect", *arguments, "--num_questions=8", "--verified_only=false")
    assert f"No space left on device: '{tmp_path}/traces.jsonl'" in said and not (tmp_path / "traces.jsonl").exists()


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'/no/file'"), add_path_to_errors(tmp_path):
        Path("/no/file").read_text()
    with pytest.raises(KeyError), add_path_to_errors(tmp_path):
        raise KeyError("x")
