"""Atomic writes: complete or not at all, never through a link, and nothing left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdzero.utils import files
from sdzero.utils.files import PARTIAL, atomic_folder, atomic_write, write_text
from support.killed_saves import dying
from support.ranks.forked import forked


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.binary(max_size=5000), max_size=4))
def test_content_arrives_and_replaces_what_was_there(tmp_path: Path, pieces: list[bytes]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        for piece in pieces:
            file.write(piece)
        assert path.read_bytes() == b"old", "not before it is complete"
    assert path.read_bytes() == b"".join(pieces) and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("planted", ["file", "link", "dangling link", "folder"])
@pytest.mark.parametrize("place", ["partial", "target"])
def test_planted_entries_are_replaced_and_links_never_followed(tmp_path: Path, planted: str, place: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    victim, path = tmp_path / "victim", folder / "file"
    if planted != "dangling link":
        victim.write_text("untouched")
    target = path if place == "target" else path.with_name(path.name + PARTIAL)
    if planted == "file":
        target.write_text("left by a killed write")
    elif planted == "folder":
        target.mkdir()
        (target / "link").symlink_to(victim)
    else:
        target.symlink_to(victim)
    if planted == "folder" and place == "target":
        with pytest.raises(IsADirectoryError):
            write_text(path, "new")
        assert [*folder.iterdir()] == [path]
    else:
        write_text(path, "new")
        assert path.read_text() == "new" and not path.is_symlink() and [*folder.iterdir()] == [path]
    assert not victim.exists() if planted == "dangling link" else victim.read_text() == "untouched"


def test_a_link_planted_while_the_partial_file_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exclusive creation closes the gap between the removal of a planted link and the creation of the file."""
    path, victim = tmp_path / "file", tmp_path / "victim"
    monkeypatch.setattr(files, "delete", lambda partial: partial.symlink_to(victim))
    with pytest.raises(FileExistsError):
        write_text(path, "new")
    assert not path.exists() and not victim.exists()


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_leaves_the_old_content_and_no_partial_file(tmp_path: Path, error: BaseException) -> None:
    (file := tmp_path / "file").write_text("old")
    (folder := tmp_path / "folder").mkdir()
    (folder / "inner").write_text("old")
    with pytest.raises(type(error)) as of_file, atomic_write(file) as stream:
        stream.write(b"new")
        raise error
    with pytest.raises(type(error)), atomic_folder(folder) as partial:
        (partial / "inner").write_text("new")
        raise error
    assert file.read_text() == (folder / "inner").read_text() == "old" and {*tmp_path.iterdir()} == {file, folder}
    if isinstance(error, OSError):
        assert of_file.value.filename == str(file)  # pyright: ignore[reportAttributeAccessIssue]


def test_content_is_durable_before_the_rename_and_the_rename_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).relative_to(tmp_path)}")
        fsync(handle)

    def note_replace(old: Path, new: Path) -> None:
        steps.append(f"rename to {new.name}")
        replace(old, new)

    monkeypatch.setattr("os.fsync", note_fsync)
    monkeypatch.setattr("os.replace", note_replace)
    write_text(tmp_path / "a", "new")
    assert steps == [f"sync a{PARTIAL}", "rename to a", "sync ."]
    steps.clear()
    with atomic_folder(tmp_path / "b") as partial:
        (partial / "inner").mkdir()
        (partial / "inner/file").write_text("new")
    synced = {f"sync b{PARTIAL}", f"sync b{PARTIAL}/inner", f"sync b{PARTIAL}/inner/file"}
    assert {*steps[:3]} == synced and steps[3:] == ["rename to b", "sync ."]


def test_two_writers_with_tags(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path, tag=".1") as one, atomic_write(path, tag=".2") as two:
        one.write(b"one" * 1000)
        two.write(b"two")
    assert path.read_bytes() == b"one" * 1000, "the one that ends last"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("planted", ["folder", "file", "link", "link at the partial folder"])
def test_a_folder_replaces_what_was_there_and_follows_no_link(tmp_path: Path, planted: str) -> None:
    (victim := tmp_path / "victim").mkdir()
    (victim / "file").write_text("untouched")
    path = tmp_path / "parent" / "folder"
    path.parent.mkdir()
    if planted == "folder":
        path.mkdir()
        (path / "old").touch()
    elif planted == "file":
        path.write_text("old")
    else:
        (path if planted == "link" else path.with_name(path.name + PARTIAL)).symlink_to(victim)
    with atomic_folder(path) as partial:
        (partial / "new").touch()
    assert not path.is_symlink() and [*path.iterdir()] == [path / "new"] and [*path.parent.iterdir()] == [path]
    assert (victim / "file").read_text() == "untouched"


def write_to(path: Path, text: str) -> None:
    if path.name == "file":
        return write_text(path, text)
    with atomic_folder(path) as partial:
        (partial / "inner").write_text(text)


@pytest.mark.parametrize(
    ("name", "function", "call", "content"),
    [
        ("file", "fsync", 1, "old"),
        ("file", "replace", 1, "old"),
        ("file", "fsync", 2, "new"),
        ("folder", "replace", 1, "old"),
        ("folder", "replace", 2, None),  # between the two renames
        ("folder", "fsync", 3, "new"),
    ],
)
def test_kills_leave_old_or_new_and_the_next_write_cleans_up(
    tmp_path: Path, name: str, function: str, call: int, content: str | None
) -> None:
    (folder := tmp_path / "folder").mkdir()
    path = folder / name
    inner = path / "inner" if name == "folder" else path
    inner.parent.mkdir(exist_ok=True)
    inner.write_text("old")

    def work(_: int) -> None:
        setattr(os, function, dying(getattr(os, function), "before", call))
        write_to(path, "new")

    assert forked(1, tmp_path / "log", work) == [-signal.SIGKILL]
    assert (inner.read_text() if inner.exists() else None) == content
    write_to(path, "newest")
    assert inner.read_text() == "newest" and [*folder.iterdir()] == [path]
