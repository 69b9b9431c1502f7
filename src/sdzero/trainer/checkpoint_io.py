"""Atomic, verified one-file checkpoints, and the search for the newest one.

    save   : <name>.sdzero-partial in the SAME folder, fsync, os.replace, fsync the folder,
             then its manifest <name>.sha256.json in the same way
    load   : size and sha256 must be the manifest's
    resume : `newest_checkpoint` walks back to the newest file, or folder of a sharded strategy, that verifies

The manifest lists every content that is valid for its file: one, or two while a file of the same name (last.ckpt) is
being replaced, so that a kill before or after the replacement leaves a checkpoint that verifies.
`sdzero.trainer.sharded_checkpoint` does the same for folders.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from sdzero.trainer.checkpoint_manifest import (
    CheckpointError,
    Content,
    FolderContent,
    clean_up,
    damaged,
    manifest_path,
    read_manifest,
    remove,
    set_aside,
    warn_unverified,
    write_manifest,
)
from sdzero.utils.files import atomic_write, file_sha256

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that saves each one-file checkpoint complete and verified, or not at all.

    In a recipe: `trainer.plugins: [sdzero.trainer.AtomicCheckpointIO]`. Sharded strategies write their folders without
    it (`sdzero.trainer.strategies`). Only one process at a time may save into a folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` and then its manifest; remove leftovers of killed saves from the folder.

        Raises:
            TypeError: `storage_options` was given.
            ValueError: the path is a URL.
            CheckpointError: the file could not be written; the previous content is untouched.
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
                "make room on the disk or repair it, and resume from the newest of them"
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify and load a checkpoint; `map_location` and `weights_only` as in `torch.load`.

        A file without a manifest (from another writer, or from a save killed just before its manifest) is loaded with
        a warning.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: size or sha256 differ from the manifest, or it is a sharded strategy's folder.
        """
        local = Path(path)
        if local.is_dir():
            raise CheckpointError(
                f"{path} is the folder of a sharded strategy: resume with the strategy that wrote it, e.g. "
                "--trainer.strategy sdzero.trainer.FullShard, which also runs in one process"
            )
        if local.is_file():
            listed = read_manifest(local)
            faults = [content.fault(local) for content in listed]
            if not listed:
                warn_unverified(local)
            elif all(faults):
                raise damaged(local, str(faults[0]))
        return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file, then its manifest; or a folder with its content."""
        remove(Path(path))


def newest_checkpoint(folder: Path, verify: bool = True) -> Path | None:
    """Return the newest `*.ckpt` of a folder that verifies, by global step and then modification time.

    A checkpoint is a file, or the folder of a sharded strategy. Logs a warning with the reason for each that is passed
    over. Changes nothing on disk.

    Args:
        folder: folder to search.
        verify: read whole checkpoints; False trusts their manifests.

    Returns:
        The checkpoint; None if no save was finished.

    Raises:
        CheckpointError: there are finished checkpoints, and none of them verifies.
    """
    found: list[tuple[int, int, Path, Content | FolderContent]] = []
    for path in folder.glob("*.ckpt"):
        if path.is_symlink():  # its target is listed under its own name
            continue
        try:
            listed = read_manifest(path)
        except CheckpointError as error:
            log.warning("passing over %s: %s", path, error)
            continue
        if not listed:
            log.warning("passing over %s: it has no manifest, so its save was not finished", path)
        changed = manifest_path(path) if path.is_dir() else path
        found += [(content.global_step, changed.stat().st_mtime_ns, path, content) for content in listed]
    for step, _, path, content in sorted(found, key=lambda item: item[:3], reverse=True):
        fault = content.fault(path) if verify else None
        if fault is None:
            return path
        log.warning("passing over %s at step %d: %s", path, step, fault)
    if found:
        raise CheckpointError(
            f"none of the checkpoints in {folder} verifies. Repair the disk or restore a backup; remove them to start "
            "from scratch"
        )
    return None


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_up(path.parent)
    folder = set_aside(path) if path.is_dir() else None  # a sharded strategy's
    try:
        old = [content for content in read_manifest(path) if isinstance(content, Content)]
    except CheckpointError as error:
        log.warning("replacing %s: %s", path, error)
        old = []
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # of torch's zip writer, in the place of the failed write's own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        written = Path(file.name)
        new = Content(file_sha256(written), written.stat().st_size, int(checkpoint.get("global_step", 0)))
        if old:
            write_manifest(path, [new, *old])
    write_manifest(path, [new])
    if folder is not None:
        remove(folder)
