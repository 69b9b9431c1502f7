"""Sharded checkpoints of one process: killed at every step of a save, replaced, removed, refused.

Two ranks: test_checkpoint_ranks.py.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdzero.trainer.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from sdzero.trainer.checkpoint_manifest import OLD, CheckpointError, clean_up, manifest_path
from sdzero.utils.files import PARTIAL
from support.killed_saves import killed_saves
from support.lone_strategy import Lone, save


def step_of(path: Path | None) -> int:
    assert path is not None
    loaded = Lone().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["weights"], torch.full((1000,), float(loaded["global_step"])))
    return loaded["global_step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_holds_its_manifest_and_is_removed_with_it(tmp_path: Path) -> None:
    path = save(tmp_path / "new/folder", 3)
    assert names(path) == [".metadata", "__0_0.distcp", "meta.pt", "sha256.json"]
    assert step_of(path) == 3 and newest_checkpoint(path.parent) == path
    Lone().remove_checkpoint(path)
    assert names(path.parent) == []


def test_folders_and_files_stand_side_by_side(tmp_path: Path) -> None:
    """A run may change its strategy: the newest is the newest of both, and each takes the other's name."""
    io = AtomicCheckpointIO()
    file = tmp_path / "step=2.ckpt"
    io.save_checkpoint({"global_step": 2}, file)
    assert newest_checkpoint(tmp_path) == file
    assert newest_checkpoint(tmp_path) != save(tmp_path, 1)
    folder = save(tmp_path, 3)
    assert newest_checkpoint(tmp_path) == folder
    io.save_checkpoint({"global_step": 4}, folder)
    assert folder.is_file() and newest_checkpoint(tmp_path) == folder
    assert save(tmp_path, 5, "step=2.ckpt").is_dir() and step_of(newest_checkpoint(tmp_path)) == 5
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt", "step=3.ckpt.sha256.json"]
    Lone().remove_checkpoint(folder)
    io.remove_checkpoint(file)
    assert names(tmp_path) == ["step=1.ckpt"]


def test_one_file_is_saved_by_the_checkpoint_io(tmp_path: Path) -> None:
    strategy = Lone(checkpoint_io=AtomicCheckpointIO())
    strategy.writes_folders = False
    strategy.save_checkpoint({"global_step": 7}, tmp_path / "a.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "a.ckpt" and manifest_path(tmp_path / "a.ckpt").is_file()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        Lone().save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt", storage_options={})
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="folder of a sharded strategy.*FullShard"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(ValueError, match="written by Lone, and Another expects .*resume with the strategy .*Lone"):
        type("Another", (Lone,), {})().load_checkpoint(path)
    os.truncate(path / "meta.pt", 10)
    with pytest.raises(CheckpointError, match=r"damaged: meta.pt: it has 10 bytes.*newest_checkpoint"):
        step_of(path)


def test_a_link_counts_as_its_target(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    (tmp_path / "last.ckpt").symlink_to(path.name)
    assert newest_checkpoint(tmp_path) == path and step_of(tmp_path / "last.ckpt") == 4
    Lone().remove_checkpoint(tmp_path / "last.ckpt")
    assert step_of(path) == 4 and names(tmp_path) == [path.name]


@pytest.mark.parametrize("room", [100, 20_000])  # the shard, then what is after it
def test_a_failed_write_leaves_the_previous_checkpoint_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    good = save(tmp_path, 1)
    real, torch_save = os.fsync, torch.save

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if room == 100 else (torch, "save", full)))
    with pytest.raises(CheckpointError, match=r"MiB free: rank 0: .*No space left on device.*make room"):
        save(tmp_path, 2)
    monkeypatch.setattr(os, "fsync", real)
    monkeypatch.setattr(torch, "save", torch_save)
    assert newest_checkpoint(tmp_path) == good and names(tmp_path) == [good.name]
    assert step_of(save(tmp_path, 2)) == 2


def test_a_file_that_rank_0_does_not_see_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes without a shared disk: each would keep a part of it."""
    monkeypatch.setattr(Lone, "_write", lambda self, checkpoint, partial: {"__1_0.distcp": ("0", 5)})
    with pytest.raises(CheckpointError, match="__1_0.distcp is not in .*all ranks must share that folder"):
        save(tmp_path, 1)
    assert newest_checkpoint(tmp_path) is None


# fsync: torch's two of shard and .metadata, ours of the three files, the manifest, its folder, the folder above
NEW = [f"step=2.ckpt {call} {n}" for call in ("fsync before", "fsync after") for n in range(1, 9)]
NEW += [f"step=2.ckpt {call} {n}" for call in ("replace before", "replace after") for n in (1, 2)]  # manifest, folder
SAME = [f"step=1.ckpt {call} {n}" for call in ("replace before", "replace after") for n in range(1, 5)]
SAME += ["step=1.ckpt rmdir before 1", "step=1.ckpt rmdir after 1"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per kill: step 1 was saved, then the save of step 2 was killed at the named call of os."""
    return killed_saves(save, save(tmp_path_factory.mktemp("killed"), 1), [*NEW, *SAME])


@pytest.mark.parametrize("case", NEW)
def test_a_killed_save_leaves_the_previous_checkpoint(killed: dict[str, Path], case: str) -> None:
    folder = killed[case]
    finished = case in ("step=2.ckpt replace after 2", "step=2.ckpt fsync before 8", "step=2.ckpt fsync after 8")
    assert step_of(folder / "step=1.ckpt") == 1
    assert step_of(newest_checkpoint(folder)) == (2 if finished else 1)
    save(folder, 3)
    assert names(folder) == ["step=1.ckpt", *["step=2.ckpt"] * finished, "step=3.ckpt"]


@pytest.mark.parametrize("case", SAME)
def test_a_killed_save_over_the_same_name_leaves_the_old_or_the_new_one(killed: dict[str, Path], case: str) -> None:
    """Renames: manifest, old out of the way, new into its place, old to be deleted."""
    folder = killed[case]
    replaced = case.endswith(
        ("replace after 3", "replace before 4", "replace after 4", "rmdir before 1", "rmdir after 1")
    )
    assert step_of(newest_checkpoint(folder)) == (2 if replaced else 1)
    clean_up(folder)
    assert names(folder) == ["step=1.ckpt"] and step_of(folder / "step=1.ckpt") == (2 if replaced else 1)
    save(folder, 3, "step=1.ckpt")
    assert names(folder) == ["step=1.ckpt"] and step_of(folder / "step=1.ckpt") == 3


def test_the_window_in_which_no_folder_has_the_name(killed: dict[str, Path]) -> None:
    """It is there: without a second name for the old one, a kill would leave nothing."""
    saved = save(killed["step=1.ckpt replace after 2"].parent / "window", 1)
    os.replace(saved, saved.with_name(f"step=1{OLD}.ckpt"))
    shutil.copytree(saved.with_name(f"step=1{OLD}.ckpt"), saved.with_name(saved.name + PARTIAL))
    assert newest_checkpoint(saved.parent) == saved.with_name(f"step=1{OLD}.ckpt")
    save(saved.parent, 2)
    assert names(saved.parent) == ["step=1.ckpt", "step=2.ckpt"]
