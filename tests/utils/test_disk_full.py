"""A disk that is full while a stage writes: one line that says where, whoever was writing."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tensorboard.summary.writer.record_writer import RecordWriter

from sdzero.utils.disk_full import add_path_to_errors
from support.runs import SMOKE, refusal
from support.tiny_model import write_tiny_model


def fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: Path) -> str:
    """Of one step of SelfDistill, with everything that writes at every step."""
    arguments = (
        *("fit", "--config", SMOKE / "self_distill.yaml", f"--trainer.default_root_dir={out}", "--trainer.max_steps=1"),
        *("--model.student.path=configs/tiny_model", "--model.student.weights=random", "--data.disjoint_from=null"),
        *("--trainer.val_check_interval=1", "--data.sampling.max_new_tokens=8", "--model.teacher=null"),
    )
    return refusal(capsys, monkeypatch, *arguments)


def full(path: Path) -> None:
    """A file that can be opened, and on whose disk there is no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("file", ["journal/rank0/calls.log", "samples/.train-000000-rank0.jsonl.partial"])
def test_journal_and_samples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    full(tmp_path / file)
    said = fit(capsys, monkeypatch, tmp_path)
    assert f"No space left on device: '{tmp_path}'. Finished work is kept: free some space" in said


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
    full(tmp_path / ".traces.jsonl.partial")
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=1, hidden_size=32)
    arguments = ("--config", SMOKE / "collect.yaml", f"--student.path={model}", f"--out={tmp_path}")
    said = refusal(capsys, monkeypatch, "collect", *arguments, "--num_questions=8", "--verified_only=false")
    assert f"No space left on device: '{tmp_path}/traces.jsonl'" in said and not (tmp_path / "traces.jsonl").exists()


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'/no/file'"), add_path_to_errors(tmp_path):
        Path("/no/file").read_text()
    with pytest.raises(KeyError), add_path_to_errors(tmp_path):
        raise KeyError("x")
