"""Manifests of checkpoints, and the steps by which one checkpoint replaces another.

A file's manifest lies beside it (<name>.sha256.json), a folder's is the last file written into it (sha256.json).
A checkpoint without a manifest was not finished.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sdzero.utils.files import PARTIAL, atomic_write, delete, file_sha256
from sdzero.utils.row_checksum import dumps_with_checksum, verify_checksum

log = logging.getLogger(__name__)

OLD = ".sdzero-old"
"""In the name of a checkpoint that is being replaced; it still verifies and can be resumed from."""
MANIFEST = "sha256.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or differs from what was written."""


def damaged(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {fault}. Resume from an older one: "
        f"newest_checkpoint(Path({str(path.parent)!r})) finds the newest that verifies"
    )


def warn_unverified(path: Path) -> None:
    log.warning("%s has no manifest: loading it unverified", path)


@dataclass(frozen=True)
class Content:
    """Content of a checkpoint file."""

    sha256: str
    size: int  # bytes
    global_step: int  # optimizer steps taken

    def fault(self, path: Path) -> str | None:
        """Return a reason why the file differs from this content; None if it does not."""
        return _compare(path, self.sha256, self.size)


@dataclass(frozen=True)
class FolderContent:
    """Content of a checkpoint folder."""

    global_step: int  # optimizer steps taken
    num_ranks: int  # processes that wrote it
    strategy: str  # name of the class that wrote it; other classes expect other names of tensors
    files: dict[str, tuple[str, int]]  # name -> (sha256, size in bytes), for all files except the manifest

    def fault(self, path: Path, files: Collection[str] | None = None) -> str | None:
        """Return a reason why the folder differs from this content; None if it does not. `files`: None verifies all."""
        for name in sorted(self.files if files is None else files):
            if not (path / name).is_file():
                return f"{name} is missing"
            if fault := _compare(path / name, *self.files[name]):
                return f"{name}: {fault}"
        return None


def _compare(path: Path, sha256: str, size: int) -> str | None:
    if (found_size := path.stat().st_size) != size:
        return f"it has {found_size} bytes, but its manifest says {size}"
    found = file_sha256(path)
    return None if found == sha256 else f"its sha256 is {found}, but its manifest says {sha256}"


def manifest_path(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's manifest: beside a file, inside a folder."""
    if checkpoint.is_dir():
        return checkpoint / MANIFEST
    return checkpoint.with_name(f"{checkpoint.name}.{MANIFEST}")


def read_manifest(path: Path) -> list[Content] | list[FolderContent]:
    """Return the valid contents of a checkpoint: two for a file that is being replaced, none without a manifest.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    manifest = manifest_path(path.resolve())
    try:
        entries = [verify_checksum(entry) for entry in json.loads(manifest.read_text())]
        if path.is_dir():
            return [FolderContent(**{**e, "files": {n: (s, z) for n, (s, z) in e["files"].items()}}) for e in entries]
        return [Content(**entry) for entry in entries]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"its manifest {manifest} cannot be read: {error}") from error


def write_manifest(path: Path, listed: Iterable[Content | FolderContent]) -> None:
    rows = ",\n ".join(dumps_with_checksum(asdict(content)) for content in listed)
    with atomic_write(manifest_path(path)) as file:
        file.write(f"[{rows}]\n".encode())


def set_aside(path: Path) -> Path:
    """Rename a checkpoint whose name is needed; return its new path, under which it still verifies."""
    old = path.with_name(path.stem + OLD + path.suffix)
    _move(path, old)
    return old


def _move(path: Path, to: Path) -> None:
    manifest = None if path.is_dir() else manifest_path(path)
    os.replace(path, to)
    if manifest is not None and manifest.exists():
        os.replace(manifest, manifest_path(to))


def clean_up(folder: Path) -> None:
    """Remove what killed saves left in a folder, and restore the checkpoints they had set aside."""
    for old in folder.glob(f"*{OLD}*"):
        path = old.with_name(old.name.replace(OLD, ""))
        if old.name.endswith((PARTIAL, MANIFEST)):
            continue
        if path.exists():
            remove(old)
        else:
            log.warning("%s is restored: the save that should replace it was killed", path)
            _move(old, path)
    for partial in folder.glob(f"*{PARTIAL}"):
        log.info("removing %s, left by a save that was killed", partial)
        delete(partial)


def remove(path: Path) -> None:
    """Remove a checkpoint and its manifest. A kill leaves a complete checkpoint or none."""
    if path.is_dir() and not path.is_symlink():
        partial = path.with_name(path.name + PARTIAL)
        delete(partial)
        os.replace(path, partial)
        delete(partial)
        return
    path.unlink(missing_ok=True)
    if not path.is_symlink():
        manifest_path(path).unlink(missing_ok=True)
