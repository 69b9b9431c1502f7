"""A disk that is full while a stage writes gives one line that names the place, whichever library was writing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tensorboard.summary.writer.record_writer import RecordWriter

from sdzero.utils.files import PARTIAL, add_path_to_errors
from support.runs import SMOKE, refusal
from support.tiny_model import write_tiny_model


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Fail every flush of the atomic write of a file called `name`."""
    fsync = os.fsync

    def fail(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(f"/{name}{PARTIAL}"):
            raise full()
        fsync(handle)

    monkeypatch.setattr("os.fsync", fail)


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread raises too
@pytest.mark.parametrize("writer", ["journal", "samples", "curves", "model"])
def test_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, writer: str) -> None:
    """One step of SelfDistill, with everything that writes at every step."""
    named = tmp_path
    if writer == "journal":  # /dev/full can be opened, but not written to
        (log := tmp_path / "journal/rank0/calls.log").parent.mkdir(parents=True)
        log.symlink_to("/dev/full")
    elif writer == "samples":
        named = tmp_path / "samples/train-000000-rank0.jsonl"
        fill_disk(monkeypatch, named.name)
    elif writer == "curves":
        monkeypatch.setattr(RecordWriter, "write", fail_with(full()))
    else:
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        monkeypatch.setattr("sdzero.callbacks.export_model.export", fail_with(error))
    arguments = (
        *("--config", SMOKE / "self_distill.yaml", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1"),
        *("--model.student.path=configs/tiny_model", "--model.student.weights=random", "--data.disjoint_from=null"),
        *("--trainer.val_check_interval=1", "--data.sampling.max_new_tokens=8", "--model.teacher=null"),
    )
    printed = refusal(capsys, monkeypatch, "fit", *arguments)
    assert f"No space left on device: '{named}'. Finished work is kept: free some space" in printed
    assert named.is_dir() or not named.exists()


def test_traces(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill_disk(monkeypatch, "traces.jsonl")
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=1, hidden_size=32)
    arguments = ("--config", SMOKE / "collect.yaml", f"--student.path={model}", f"--out={tmp_path}")
    printed = refusal(capsys, monkeypatch, "collect", *arguments, "--num_questions=8", "--verified_only=false")
    assert f"No space left on device: '{tmp_path}/traces.jsonl'" in printed and not (tmp_path / "traces.jsonl").exists()


def test_other_errors_are_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'/no/file'"), add_path_to_errors(tmp_path):
        Path("/no/file").read_text()
    with pytest.raises(KeyError), add_path_to_errors(tmp_path):
        raise KeyError("x")
