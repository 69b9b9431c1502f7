"""One-file checkpoints that a kill, a full disk or a bad disk cannot silently spoil.

    save   : <name>.sdzero-partial in the SAME folder, fsync, os.replace, fsync the folder,
             then its manifest <name>.sha256.json in the same way
    load   : size and sha256 must be the manifest's
    resume : `newest_checkpoint` walks back to the newest file that verifies

The manifest is a list of every content its file may rightly have: one, and two while a file of the same name
(last.ckpt) is being replaced, so that a kill on either side of the replacement leaves a checkpoint that verifies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

log = logging.getLogger(__name__)

PARTIAL = ".sdzero-partial"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what was written."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint file holds. sha256: hex digest; size: bytes; global_step: optimizer steps taken."""

    sha256: str
    size: int
    global_step: int


class _HashingFile:
    """What torch.save needs of a file. Hashes what was meant to be written, and remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves one-file checkpoints so that each of them is either whole and verified, or not there.

    In a recipe: `trainer.plugins: [sdzero.checkpoints.AtomicCheckpointIO]`. FSDP and ModelParallel strategies write
    their sharded folders without it. One process at a time may save into a folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes `checkpoint` to a local path and then its manifest; removes what killed saves left in the folder.

        Raises:
            TypeError: `storage_options` was given.
            ValueError: the path is a URL.
            CheckpointError: the file could not be written. Whatever was there before still is.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} writes local files: storage_options are not supported")
        if "://" in str(path):
            raise ValueError(
                f"checkpoint path {path} is a URL, which cannot be replaced atomically: use a local folder"
            )
        try:
            _save(checkpoint, Path(path))
        except OSError as error:
            raise CheckpointError(
                f"could not save {path}: {error}. Earlier checkpoints are untouched; "
                "make room on the disk or mend it, and resume from the newest of them"
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads what `save_checkpoint` wrote; `map_location` and `weights_only` as in `torch.load`.

        A file without a manifest (written by something else, or a save killed just before its manifest) is loaded with
        a warning.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file's size or sha256 is not its manifest's.
        """
        local = Path(path)
        if local.is_file():
            contents = _contents(local)
            faults = [_fault(local, content) for content in contents]
            if not contents:
                log.warning("%s has no manifest: loading it unverified", local)
            elif all(faults):
                raise CheckpointError(
                    f"{path} is damaged: {faults[0]}. Resume from an older one: "
                    f"newest_checkpoint(Path({str(local.parent)!r})) finds the newest that verifies"
                )
        return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes the file, then its manifest."""
        super().remove_checkpoint(path)
        manifest_path(Path(path)).unlink(missing_ok=True)


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint file lies: beside it."""
    return checkpoint.with_name(checkpoint.name + ".sha256.json")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest `*.ckpt` file of a folder that verifies, by global step and then time of change; None without one.

    Logs a warning for each file it passes over, with the reason. Changes nothing on disk.
    """
    found: list[tuple[int, int, Path, Content]] = []
    for path in sorted(folder.glob("*.ckpt")):
        if path.is_symlink() or not path.is_file():  # a link's target is here under its own name
            continue
        try:
            contents = _contents(path)
        except CheckpointError as error:
            log.warning("passing over %s: %s", path, error)
            continue
        if not contents:
            log.warning("passing over %s: it has no manifest, so its save was not finished", path)
        found += [(content.global_step, path.stat().st_mtime_ns, path, content) for content in contents]
    for _, _, path, content in sorted(found, key=lambda item: item[:2], reverse=True):
        fault = _fault(path, content)
        if fault is None:
            return path
        log.warning("passing over %s at step %d: %s", path, content.global_step, fault)
    return None


def _fault(path: Path, content: Content) -> str | None:
    """Why a file does not have that content; None if it has."""
    size = path.stat().st_size
    if size != content.size:
        return f"it has {size} bytes where its manifest says {content.size}"
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return None if sha256 == content.sha256 else f"its sha256 is {sha256} where its manifest says {content.sha256}"


def _contents(path: Path) -> list[Content]:
    """What a checkpoint's manifest lists; [] without a manifest."""
    manifest = manifest_path(path.resolve())
    try:
        return [Content(**entry) for entry in json.loads(manifest.read_text())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"its manifest {manifest} cannot be read: {error}") from error


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for partial in path.parent.glob(f"*{PARTIAL}"):
        log.info("removing %s, left by a save that was killed", partial)
        partial.unlink(missing_ok=True)
    try:
        old = _contents(path)
    except CheckpointError as error:
        log.warning("replacing %s: %s", path, error)
        old = []
    with _replacing(path) as file:
        new = _torch_save(checkpoint, file)
        if old:
            _write_manifest(path, [new, *old])
    _write_manifest(path, [new])


def _torch_save(checkpoint: dict[str, Any], file: BinaryIO) -> Content:
    """torch.save, raising the OSError of a failed write, which torch's zip writer hides behind a RuntimeError."""
    sink = _HashingFile(file)
    try:
        torch.save(checkpoint, sink)  # pyright: ignore[reportArgumentType] - it needs write and flush, no more
    except RuntimeError:
        if sink.error is not None:
            raise sink.error from None
        raise
    return Content(sink.digest.hexdigest(), sink.size, int(checkpoint.get("global_step", 0)))


def _write_manifest(path: Path, contents: list[Content]) -> None:
    with _replacing(manifest_path(path)) as file:
        file.write(json.dumps([asdict(content) for content in contents], indent=1).encode() + b"\n")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that appears under `path` whole and durable, or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # gone already where it replaced the old file
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else a power cut may undo the replacement
    finally:
        os.close(folder)
