"""Atomic, verified sharded checkpoints, which are folders.

    save   : every rank writes its shard into <name>.sdzero-partial and hashes it; rank 0 writes the manifest last
             and renames the folder
    load   : every rank verifies its share of the files; all ranks raise if a file is damaged
    error  : an error on one rank is raised on all

All ranks must see the same file system.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.strategies import ParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.optim import Optimizer

from sdzero.trainer.checkpoint_manifest import (
    CheckpointError,
    FolderContent,
    clean_up,
    damaged,
    read_manifest,
    remove,
    set_aside,
    warn_unverified,
    write_manifest,
)
from sdzero.trainer.collectives import all_gather_objects
from sdzero.utils.files import PARTIAL, file_sha256, sync

log = logging.getLogger(__name__)
T = TypeVar("T")
Files = dict[str, tuple[str, int]]


class AtomicFolders(ParallelStrategy):
    """Mixin that makes a Lightning strategy's sharded checkpoints atomic. List it before the Lightning class."""

    writes_folders = True
    """Each rank writes its shard; otherwise rank 0 gathers all into one file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint. Collective.

        Raises:
            TypeError: `storage_options` was given.
            CheckpointError: on every rank if any of them failed; the previous content is untouched.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} writes local files: storage_options are not supported")
        path = Path(self.broadcast(str(filepath)))
        if not self.writes_folders:
            self._run_on_rank_0(path, lambda: self.checkpoint_io.save_checkpoint(checkpoint, path))
            return
        partial, step = path.with_name(path.name + PARTIAL), int(checkpoint["global_step"])
        self._run_on_rank_0(path, lambda: _make_room(partial))
        try:
            files = self._raise_on_all_ranks(path, lambda: self._write(checkpoint, partial))
        except CheckpointError:
            if self.global_rank == 0:
                remove(partial)
            raise
        merged = {name: content for own in files for name, content in own.items()}
        content = FolderContent(step, len(files), type(self).__name__, merged)
        self._run_on_rank_0(path, lambda: _finish(partial, path, content))

    def _write(self, checkpoint: dict[str, Any], partial: Path) -> Files:
        """Write this rank's files; return their hashes and sizes."""
        super().save_checkpoint(checkpoint, partial)
        own = [*partial.glob(f"__{self.global_rank}_*")]
        if self.global_rank == 0:
            own += [partial / ".metadata", partial / _METADATA_FILENAME]
        for file in own:
            sync(file)
        return {file.name: (file_sha256(file), file.stat().st_size) for file in own}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder or a file that any number of ranks wrote. Collective.

        Raises:
            CheckpointError: on every rank if a file is damaged or missing.
            ValueError: another strategy wrote the folder.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        faults = [fault for fault in all_gather_objects(self._fault(path)) if fault]
        if faults:
            raise damaged(path, faults[0])
        own = type(self).__name__
        for content in read_manifest(path):
            if isinstance(content, FolderContent) and content.strategy != own:
                raise ValueError(
                    f"{path} was written by {content.strategy}, and {own} expects other names in it: resume with the "
                    f"strategy sdzero.trainer.strategies.{content.strategy}"
                )
        return super().load_checkpoint(path, weights_only=weights_only)

    def _fault(self, path: Path) -> str | None:
        """Verify this rank's share of a checkpoint, rank 0 that of a file; return the fault or None."""
        try:
            listed = read_manifest(path)
        except CheckpointError as error:
            return str(error)
        if not listed and self.global_rank == 0:
            warn_unverified(path)
        faults = []
        for content in listed:
            if isinstance(content, FolderContent):
                faults.append(content.fault(path, sorted(content.files)[self.global_rank :: self.world_size]))
            elif self.global_rank == 0:
                faults.append(content.fault(path))
        return faults[0] if faults and all(faults) else None

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, folder or file, with its manifest."""
        if self.global_rank == 0:
            remove(Path(filepath))

    def _run_on_rank_0(self, path: Path, work: Callable[[], None]) -> None:
        self._raise_on_all_ranks(path, work if self.global_rank == 0 else lambda: None)

    def _raise_on_all_ranks(self, path: Path, work: Callable[[], T]) -> list[T]:
        """Run `work` and gather all ranks' results; raise on every rank if it failed on one, so that none waits."""
        result, failure = None, None
        try:
            result = work()
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - raised below, on every rank
            failure = error
        mine = None if failure is None else f"rank {self.global_rank}: {_summarize(failure)}"
        messages, results = zip(*all_gather_objects((mine, result)), strict=True)
        if any(messages):
            # torch hides the reason of a failed write behind its own errors: free space may explain it
            free = shutil.disk_usage(path.parent).free / 2**20
            raise CheckpointError(
                f"could not save {path} onto a disk with {free:.0f} MiB free: {'; '.join(filter(None, messages))}. "
                "Earlier checkpoints are untouched; make room on the disk or repair it, and resume from the newest of "
                "them"
            ) from failure
        return list(results)


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the optimizer state of a one-file checkpoint into an optimizer over sharded weights. Collective.

    The file numbers the optimizer's weights in their order.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    ours = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    theirs = [number for group in state["param_groups"] for number in group["params"]]
    name_of = dict(zip(theirs, ours, strict=True))
    named = {
        "state": {name_of[number]: values for number, values in state["state"].items()},
        "param_groups": [{**g, "params": [name_of[number] for number in g["params"]]} for g in state["param_groups"]],
    }
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=named, options=options)


def _make_room(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    clean_up(partial.parent)
    partial.mkdir()


def _finish(partial: Path, path: Path, content: FolderContent) -> None:
    """Write the manifest and rename the folder to its final path.

    Raises:
        FileNotFoundError: a file that another rank wrote is missing.
    """
    for name, (_, size) in content.files.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != size:
            raise FileNotFoundError(
                f"{name} is not in {partial} as its rank wrote it: all ranks must share that folder"
            )
    write_manifest(partial, [content])
    old = set_aside(path) if path.exists() else None  # remains a checkpoint until the folder is renamed
    os.replace(partial, path)
    sync(path.parent)
    if old is not None:
        remove(old)


def _summarize(error: BaseException) -> str:
    """Return the reason without the stacks of all ranks that torch's own error contains."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"{_summarize(inner)} on rank {rank}" for rank, (inner, _) in error.failures.items())
    return f"{type(error).__name__}: {error}"
