"""Checkpoints on disk: what each of them rightly holds, and how one takes the place of another.

A file's manifest lies beside it (<name>.sha256.json), a folder's is the last file written into it (sha256.json).
A checkpoint without one was not finished.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sdzero.utils.files import PARTIAL, atomic_write, delete, file_sha256, sync
from sdzero.utils.row_checksum import dumps_with_checksum, verify_checksum

log = logging.getLogger(__name__)

OLD = ".sdzero-old"
"""In the name of a folder whose successor is just being put in its place. It is a checkpoint like any other."""
MANIFEST = "sha256.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what was written."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint file holds. sha256: hex digest; size: bytes; global_step: optimizer steps taken."""

    sha256: str
    size: int
    global_step: int

    def fault(self, path: Path) -> str | None:
        """Why the file does not hold that; None if it does."""
        return _fault(path, self.sha256, self.size)


@dataclass(frozen=True)
class FolderContent:
    """What a checkpoint folder holds.

    Attributes:
        global_step: optimizer steps taken.
        num_ranks: processes that wrote it.
        strategy: name of the class that wrote it; another one looks for other names in it.
        files: name -> (sha256, size in bytes), all files but the manifest.
    """

    global_step: int
    num_ranks: int
    strategy: str
    files: dict[str, tuple[str, int]]

    def fault(self, path: Path, files: Collection[str] | None = None) -> str | None:
        """Why the folder does not hold that; None if it does. `files`: those to look at; None looks at all."""
        for name in sorted(self.files if files is None else files):
            if not (path / name).is_file():
                return f"{name} is missing"
            if fault := _fault(path / name, *self.files[name]):
                return f"{name}: {fault}"
        return None


def _fault(path: Path, sha256: str, size: int) -> str | None:
    found_size = path.stat().st_size
    if found_size != size:
        return f"it has {found_size} bytes where its manifest says {size}"
    found = file_sha256(path)
    return None if found == sha256 else f"its sha256 is {found} where its manifest says {sha256}"


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint lies: beside a file, inside a folder."""
    if checkpoint.is_dir():
        return checkpoint / MANIFEST
    return checkpoint.with_name(f"{checkpoint.name}.{MANIFEST}")


def contents(path: Path) -> list[Content] | list[FolderContent]:
    """What a checkpoint's manifest lists: of a file that is being replaced both contents; [] without a manifest.

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


def put_in_place(folder: Path, path: Path) -> None:
    """Renames a finished folder to `path`. What was there is a checkpoint until the new one is."""
    old = set_aside(path) if path.exists() else None
    os.replace(folder, path)
    sync(path.parent)
    if old is not None:
        remove(old)


def set_aside(path: Path) -> Path:
    """Renames a checkpoint whose name is needed; returns its new name, under which it still verifies."""
    old = path.with_name(path.stem + OLD + path.suffix)
    _move(path, old)
    return old


def _move(path: Path, to: Path) -> None:
    manifest = None if path.is_dir() else manifest_path(path)
    os.replace(path, to)
    if manifest is not None and manifest.exists():
        os.replace(manifest, manifest_path(to))


def tidy(folder: Path) -> None:
    """Removes what killed saves left in a folder, and puts back what they had moved out of their way."""
    for old in folder.glob(f"*{OLD}*"):
        path = old.with_name(old.name.replace(OLD, ""))
        if old.name.endswith((PARTIAL, MANIFEST)):
            continue
        if path.exists():
            remove(old)
        else:
            log.warning("%s is back in its place: the save that was to replace it was killed", path)
            _move(old, path)
    for partial in folder.glob(f"*{PARTIAL}"):
        log.info("removing %s, left by a save that was killed", partial)
        delete(partial)


def remove(path: Path) -> None:
    """Removes a checkpoint and its manifest. A kill leaves it whole, or no checkpoint."""
    if path.is_dir() and not path.is_symlink():
        partial = path.with_name(path.name + PARTIAL)
        delete(partial)
        os.replace(path, partial)
        delete(partial)
        return
    path.unlink(missing_ok=True)
    if not path.is_symlink():
        manifest_path(path).unlink(missing_ok=True)
