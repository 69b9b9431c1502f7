"""Resumes on two ranks and on one from each other's checkpoints; a rank that fails in a save stops all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdzero.trainer.checkpoint_io import newest_checkpoint
from sdzero.trainer.checkpoint_manifest import clean_up
from sdzero.utils.files import PARTIAL
from support.killed_saves import flip_a_bit
from support.tiny_model import write_tiny_model

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    model = write_tiny_model(out / "model")
    command = [sys.executable, str(TESTS / "support/ranks/checkpoint_ranks.py"), str(model), str(out)]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def metrics(out: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """Weights of student and teacher, counters, and each step's random numbers and questions."""
    assert set(json.loads((out / "codes.json").read_text())[name]) == {0}, (out / name / "rank0.log").read_text()
    return torch.load(out / name / f"metrics-rank{rank}.pt")


def worst(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest relative difference of a weight."""
    a, b = ours["weights"], theirs["weights"]
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)


def asked(metrics: dict[str, Any]) -> list[list[str]]:
    return [questions for *_, questions in metrics["drawn"]]


def test_a_resume_on_as_many_ranks_is_bitwise_equal(out: Path) -> None:
    """Weights, teacher, momentum, schedule, position, and the random numbers of each rank."""
    for rank in (0, 1):
        whole, same = metrics(out, "whole", rank), metrics(out, "same", rank)
        assert all(torch.equal(w, whole["weights"][name]) for name, w in same["weights"].items())
        assert same["state"] == whole["state"] and same["state"]["teacher_generation"] == 3
        assert same["drawn"] == whole["drawn"][3:]
    assert metrics(out, "whole", 0)["drawn"] != metrics(out, "whole", 1)["drawn"]


def test_two_ranks_one_and_two_again(out: Path) -> None:
    """Steps 3 and 4 by one rank alone: the same questions, the same weights but for the order of sums."""
    whole, one, back = metrics(out, "whole"), metrics(out, "one"), metrics(out, "back")
    both = [sorted(a + b) for a, b in zip(asked(whole), asked(metrics(out, "whole", 1)), strict=True)]
    assert [sorted(questions) for questions in asked(one)] == both[2:4]
    assert asked(back) == asked(whole)[4:]
    assert 0 < worst(back, whole) < 1e-5
    assert back["state"] == whole["state"]
    for name, rank, has in (("one", 0, 2), ("back", 0, 1), ("back", 1, 1)):  # fresh random states, logged
        log = (out / name / f"rank{rank}.log").read_text()
        assert f"holds the RNG states of {has} ranks" in log
    draws = [metrics(out, name, rank)["drawn"][0][:3] for name, rank in (("one", 0), ("back", 0), ("back", 1))]
    assert len({number for drawn in draws for number in drawn}) == 9


def test_one_file_of_one_process_and_of_two_ranks(out: Path) -> None:
    """DDP's or a single device's file is resumed under FullShard, which gathers into one file, and back."""
    whole, ended = metrics(out, "whole"), metrics(out, "from_file")
    assert (out / "file/checkpoints/step=5.ckpt").is_file() and newest_checkpoint(out / "file/checkpoints")
    assert worst(ended, whole) < 1e-5
    assert ended["state"] == whole["state"]


def test_one_file_of_adapters(out: Path) -> None:
    """The optimizer holds some of the model's weights: numbered by all of them, its state would go to others."""
    assert worst(metrics(out, "adapters_again"), metrics(out, "adapters")) < 1e-5


def test_fsdp1_of_lightning_saves_and_resumes(out: Path) -> None:
    """FSDPStrategy itself, for which Lightning requires a GPU, on two gloo ranks."""
    first, whole, same = metrics(out, "plain"), metrics(out, "fsdp1"), metrics(out, "fsdp1_same")
    assert worst(whole, first) < 1e-5
    assert all(torch.equal(w, whole["weights"][name]) for name, w in same["weights"].items())
    assert same["state"] == whole["state"] and same["drawn"] == whole["drawn"][2:]


def test_a_shard_that_is_damaged_is_refused_by_every_rank(out: Path) -> None:
    assert json.loads((out / "codes.json").read_text())["damaged"] == [1, 1]
    for rank in (0, 1):
        log = (out / f"damaged/rank{rank}.log").read_text()
        assert "CheckpointError:" in log and "step=1.ckpt is damaged: __1_0.distcp: its sha256 is" in log


@pytest.mark.parametrize("fault", ["failed", "killed"])
def test_a_rank_that_cannot_save_stops_all_with_the_last_good_checkpoint_intact(
    out: Path, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    codes = json.loads((out / "codes.json").read_text())[fault]
    assert codes == ([1, 1] if fault == "failed" else [1, -signal.SIGKILL])
    folder = shutil.copytree(out / fault / "checkpoints", tmp_path / "checkpoints")
    assert newest_checkpoint(folder) == folder / "step=2.ckpt"
    left = [path.name for path in folder.iterdir() if path.name.endswith(PARTIAL)]
    assert left == ([] if fault == "failed" else [f"step=3.ckpt{PARTIAL}"])
    clean_up(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
    for rank in (0, 1) if fault == "failed" else ():
        log = (out / fault / f"rank{rank}.log").read_text()
        assert "CheckpointError: could not save" in log and "rank 1: OSError: [Errno 28] No space left" in log


DAMAGE = {
    "__1_0.distcp: its sha256": lambda folder: flip_a_bit(folder / "__1_0.distcp"),
    "__0_0.distcp: it has 1000 bytes": lambda folder: os.truncate(folder / "__0_0.distcp", 1000),
    ".metadata is missing": lambda folder: (folder / ".metadata").unlink(),
    "has no manifest": lambda folder: (folder / "sha256.json").unlink(),
    "cannot be read: its crc32": lambda folder: change_step(folder / "sha256.json"),
}


def change_step(manifest: Path) -> None:
    """All files still are as listed."""
    text = manifest.read_text()
    assert text.count('"global_step":2') == 1
    manifest.write_text(text.replace('"global_step":2', '"global_step":3'))


@pytest.mark.parametrize("why", DAMAGE)
def test_a_damaged_folder_is_passed_over_with_the_reason(
    out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    folder = shutil.copytree(out / "failed/checkpoints", tmp_path / "checkpoints")
    DAMAGE[why](folder / "step=2.ckpt")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(folder) == folder / "step=1.ckpt"
    (record,) = caplog.records
    assert str(folder / "step=2.ckpt") in record.message and why in record.message
