"""One-file checkpoints after kills, full disks, cuts and flipped bits: the last good one is there, and is found."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from sdzero.trainer.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from sdzero.trainer.checkpoint_manifest import CheckpointError, manifest_path
from sdzero.utils.files import PARTIAL
from sdzero.utils.row_checksum import verify_checksum
from support.killed_saves import flip_a_bit, killed_saves


def state(step: int, num_weights: int = 1000) -> dict:
    return {"global_step": step, "weights": torch.full((num_weights,), float(step))}


def save(folder: Path, step: int, name: str | None = None) -> Path:
    path = folder / (name or f"step={step}.ckpt")
    AtomicCheckpointIO().save_checkpoint(state(step), path)
    return path


def step_of(path: Path | None) -> int | None:
    return None if path is None else AtomicCheckpointIO().load_checkpoint(path)["global_step"]


class Line(LightningModule):
    """w -> 0 by SGD: its weight shows the number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def training_step(self, batch, batch_idx):
        return self.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(8)))


def trainer(folder: Path, max_steps: int, **checkpoint_kwargs) -> Trainer:
    keep_two = {"monitor": "step", "mode": "max", "save_top_k": 2, "every_n_train_steps": 1, "filename": "{step}"}
    return Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[ModelCheckpoint(folder, **(keep_two | checkpoint_kwargs))],
    )


def test_a_saved_file_is_loaded_and_its_manifest_describes_it(tmp_path):
    path = save(tmp_path / "new" / "folder", 3)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["global_step"] == 3 and torch.equal(loaded["weights"], state(3)["weights"])
    sha256 = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    (entry,) = json.loads(manifest_path(path).read_text())
    assert verify_checksum(entry) == {"sha256": sha256, "size": path.stat().st_size, "global_step": 3} != entry
    assert sorted(p.name for p in path.parent.iterdir()) == ["step=3.ckpt", "step=3.ckpt.sha256.json"]
    AtomicCheckpointIO().remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []


def test_map_location_and_weights_only_reach_torch_load(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 0, "weights": torch.ones(2), "path": tmp_path}, path)
    io = AtomicCheckpointIO()
    assert io.load_checkpoint(path, map_location="meta", weights_only=False)["weights"].is_meta
    assert io.load_checkpoint(path, weights_only=False)["path"] == tmp_path
    with pytest.raises(Exception, match="Weights only load failed"):
        io.load_checkpoint(path, weights_only=True)


def test_refusals(tmp_path):
    io = AtomicCheckpointIO()
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(state(1), tmp_path / "a.ckpt", storage_options={})
    with pytest.raises(ValueError, match="local folder"):
        io.save_checkpoint(state(1), "s3://bucket/a.ckpt")
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint(tmp_path / "absent.ckpt")


DAMAGE = {
    "bytes, but": lambda path: os.truncate(path, path.stat().st_size - 1),
    "it has 0 bytes": lambda path: os.truncate(path, 0),
    "sha256 is": flip_a_bit,
    "no manifest": lambda path: manifest_path(path).unlink(),
    "cannot be read": lambda path: manifest_path(path).write_text("[{"),
}


@pytest.mark.parametrize("why", DAMAGE)
def test_a_damaged_file_is_passed_over_with_the_reason_and_not_loaded(tmp_path, caplog, why):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == bad
    assert not caplog.records
    DAMAGE[why](bad)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert newest_checkpoint(tmp_path) == good
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(bad) in record.message and why in record.message
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    if why != "no manifest":  # loaded with a warning, as a file of another writer
        with pytest.raises(CheckpointError, match=r"newest_checkpoint|cannot be read"):
            AtomicCheckpointIO().load_checkpoint(bad)


def test_without_a_checkpoint_that_verifies(tmp_path):
    """A training must not silently start from scratch over damaged checkpoints."""
    save(tmp_path, 1, "unfinished.ckpt")
    manifest_path(tmp_path / "unfinished.ckpt").unlink()
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "absent") is None
    os.truncate(save(tmp_path, 2), 5)
    assert newest_checkpoint(tmp_path, verify=False) == tmp_path / "step=2.ckpt"
    with pytest.raises(CheckpointError, match=r"none of the checkpoints.*remove them to start from scratch"):
        newest_checkpoint(tmp_path)


def test_a_file_of_another_writer_is_loaded_with_a_warning(tmp_path, caplog):
    torch.save(state(5), tmp_path / "foreign.ckpt")
    assert step_of(tmp_path / "foreign.ckpt") == 5
    assert "unverified" in caplog.text


def test_newest_is_by_step_then_by_time(tmp_path):
    save(tmp_path, 10)
    later = save(tmp_path, 9)
    assert step_of(newest_checkpoint(tmp_path)) == 10
    twin = save(tmp_path, 10, "z.ckpt")
    os.utime(tmp_path / "step=10.ckpt", ns=(0, later.stat().st_mtime_ns))
    os.utime(twin, ns=(0, later.stat().st_mtime_ns + 1))
    assert newest_checkpoint(tmp_path) == twin
    os.utime(tmp_path / "step=10.ckpt", ns=(0, later.stat().st_mtime_ns + 2))
    assert newest_checkpoint(tmp_path) == tmp_path / "step=10.ckpt"


def test_a_link_counts_as_its_target(tmp_path, caplog):
    path = save(tmp_path, 4)
    (tmp_path / "last.ckpt").symlink_to(path.name)  # ModelCheckpoint(save_last="link")
    assert newest_checkpoint(tmp_path) == path
    assert step_of(tmp_path / "last.ckpt") == 4
    assert not caplog.records
    flip_a_bit(path)
    with pytest.raises(CheckpointError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


CALLS = ["fsync before 1", "fsync after 1", "replace before 1", "replace after 1", "fsync after 2",
         "replace before 2", "replace after 2"]  # fmt: skip
NEW = [f"step=2.ckpt {call}" for call in CALLS]
SAME = [f"step=1.ckpt {call}" for call in [*CALLS, "replace before 3", "replace after 3"]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """One folder per kill: step 1 was saved, then the save of step 2 was killed at the named call of os."""
    return killed_saves(save, save(tmp_path_factory.mktemp("killed"), 1), [*NEW, *SAME])


@pytest.mark.parametrize("case", NEW)
def test_a_killed_save_leaves_the_previous_checkpoint(killed, case):
    folder = killed[case]
    finished = case == "step=2.ckpt replace after 2"
    assert step_of(folder / "step=1.ckpt") == 1
    assert step_of(newest_checkpoint(folder)) == (2 if finished else 1)
    stray = any(p.name.endswith(PARTIAL) for p in folder.iterdir())
    assert stray == (
        case.split(" ", 1)[1] in ("fsync before 1", "fsync after 1", "replace before 1", "replace before 2")
    )
    save(folder, 3)
    assert not any(p.name.endswith(PARTIAL) for p in folder.iterdir())
    assert step_of(newest_checkpoint(folder)) == 3


@pytest.mark.parametrize("case", SAME)
def test_a_killed_save_over_the_same_name_leaves_the_old_or_the_new_one(killed, case):
    folder = killed[case]
    replaced = case.endswith(("replace after 2", "replace before 3", "replace after 3"))  # 1: manifest of both, 2: data
    assert newest_checkpoint(folder) == folder / "step=1.ckpt"
    assert step_of(folder / "step=1.ckpt") == (2 if replaced else 1)
    save(folder, 3, "step=1.ckpt")
    assert [content["global_step"] for content in json.loads(manifest_path(folder / "step=1.ckpt").read_text())] == [3]


@pytest.mark.parametrize("num_weights", [10, 100_000])  # fits the write buffer: fails at flush; does not: at write
@pytest.mark.parametrize("name", ["step=1.ckpt", "step=2.ckpt"])
@pytest.mark.parametrize("full_for", ["data", "manifest"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_is_named(tmp_path, monkeypatch, num_weights, name, full_for):
    good = save(tmp_path, 1)
    real_open = Path.open

    def open_on_a_full_disk(self, mode="r", *args, **kwargs):
        if mode == "xb" and (".json" in self.name) == (full_for == "manifest"):
            return real_open(Path("/dev/full"), "wb")
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_on_a_full_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room") as caught:
        AtomicCheckpointIO().save_checkpoint(state(2, num_weights), tmp_path / name)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path) == good and step_of(good) == 1
    assert not any(p.name.endswith(PARTIAL) for p in tmp_path.iterdir())


@pytest.mark.parametrize("room", [1, 1000, 50_000, 400_000])
def test_a_write_that_fails_midway_leaves_the_previous_checkpoint(tmp_path, room):
    good = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            AtomicCheckpointIO().save_checkpoint(state(2, 100_000), tmp_path / "step=2.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == [good.name, manifest_path(good).name]


def test_an_error_of_torch_itself_is_not_called_a_disk_error(tmp_path):
    good = save(tmp_path, 1)
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 2, "no": lambda: 0}, good)
    assert step_of(good) == 1


def test_a_fit_keeps_two_and_resumes_from_the_newest_that_verifies(tmp_path):
    trainer(tmp_path, max_steps=4).fit(Line())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step=3.ckpt", "step=3.ckpt.sha256.json", "step=4.ckpt", "step=4.ckpt.sha256.json"
    ]  # fmt: skip
    os.truncate(tmp_path / "step=4.ckpt", 100)
    newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step=3.ckpt"
    with pytest.raises(CheckpointError):
        trainer(tmp_path, max_steps=6).fit(Line(), ckpt_path=tmp_path / "step=4.ckpt")
    resumed = Line()
    trainer(tmp_path, max_steps=6).fit(resumed, ckpt_path=newest)
    torch.testing.assert_close(resumed.weight.data, torch.full((3,), 0.8**6))
    assert step_of(newest_checkpoint(tmp_path)) == 6


def test_save_last_is_always_a_verified_copy(tmp_path):
    trainer(tmp_path, max_steps=3, save_last=True).fit(Line())
    assert step_of(tmp_path / "last.ckpt") == 3
    resumed = Line()
    trainer(tmp_path, max_steps=5, save_last=True).fit(resumed, ckpt_path="last")
    torch.testing.assert_close(resumed.weight.data, torch.full((3,), 0.8**5))
