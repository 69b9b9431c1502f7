"""Sharded checkpoints, which are folders: whole and verified, or not there, whichever rank is killed when.

    save   : every rank writes its shard into <name>.sdzero-partial and hashes it; rank 0 writes the manifest last
             and renames the folder
    load   : every rank verifies its share of the files, and all stop where one is damaged
    fault  : what fails on one rank is raised on all

All ranks must see one file system.
"""

from __future__ import annotations

import logging
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
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
    contents,
    put_in_place,
    remove,
    tidy,
    write_manifest,
)
from sdzero.trainer.collectives import all_gather_objects
from sdzero.utils.files import PARTIAL, file_sha256, sync

log = logging.getLogger(__name__)
T = TypeVar("T")
Files = dict[str, tuple[str, int]]


class AtomicFolders(ParallelStrategy):
    """What a strategy that writes checkpoint folders inherits from, before the strategy of Lightning's."""

    @property
    @abstractmethod
    def writes_folders(self) -> bool:
        """Whether each rank writes its shard; else rank 0 gathers all into one file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Collective.

        Raises:
            TypeError: `storage_options` was given.
            CheckpointError: on every rank, where one of them failed. Whatever was there before still is.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} writes local files: storage_options are not supported")
        path = Path(self.broadcast(str(filepath)))
        if not self.writes_folders:
            self._on_rank_0(path, lambda: self.checkpoint_io.save_checkpoint(checkpoint, path))
            return
        partial, step = path.with_name(path.name + PARTIAL), int(checkpoint["global_step"])
        self._on_rank_0(path, lambda: _make_room(partial))
        try:
            files = self._together(path, lambda: self._write(checkpoint, partial))
        except CheckpointError:
            if self.global_rank == 0:
                remove(partial)
            raise
        self._on_rank_0(
            path, lambda: _finish(partial, path, FolderContent(step, len(files), self._name, _merged(files)))
        )

    def _write(self, checkpoint: dict[str, Any], partial: Path) -> Files:
        """This rank's files and their hashes."""
        super().save_checkpoint(checkpoint, partial)
        own = [*partial.glob(f"__{self.global_rank}_*")]
        if self.global_rank == 0:
            own += [partial / ".metadata", partial / _METADATA_FILENAME]
        for file in own:
            sync(file)
        return {file.name: (file_sha256(file), file.stat().st_size) for file in own}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A folder or a file, of any number of ranks. Collective.

        Raises:
            CheckpointError: on every rank, where a file is damaged or missing.
            ValueError: another strategy wrote the folder.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        faults = [fault for fault in all_gather_objects(self._fault(path)) if fault]
        if faults:
            raise CheckpointError(
                f"{path} is damaged: {faults[0]}. Resume from an older one: "
                f"newest_checkpoint(Path({str(path.parent)!r})) finds the newest that verifies"
            )
        for content in contents(path):
            if isinstance(content, FolderContent) and content.strategy != self._name:
                raise ValueError(
                    f"{path} was written by {content.strategy}, and {self._name} looks for other names in it: go on "
                    f"with the strategy sdzero.trainer.strategies.{content.strategy}"
                )
        return super().load_checkpoint(path, weights_only=weights_only)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _fault(self, path: Path) -> str | None:
        """What is wrong with this rank's share of a checkpoint; a file is rank 0's."""
        try:
            listed = contents(path)
        except CheckpointError as error:
            return str(error)
        if not listed and self.global_rank == 0:
            log.warning("%s has no manifest: loading it unverified", path)
        faults = []
        for content in listed:
            if isinstance(content, FolderContent):
                faults.append(content.fault(path, sorted(content.files)[self.global_rank :: self.world_size]))
            elif self.global_rank == 0:
                faults.append(content.fault(path))
        return faults[0] if faults and all(faults) else None

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Removes a checkpoint, folder or file, with its manifest."""
        if self.global_rank == 0:
            remove(Path(filepath))

    def _on_rank_0(self, path: Path, work: Callable[[], None]) -> None:
        self._together(path, work if self.global_rank == 0 else lambda: None)

    def _together(self, path: Path, work: Callable[[], T]) -> list[T]:
        """Every rank's result of its work. What one raises, all raise: none waits for a rank that has given up."""
        result, failure = None, None
        try:
            result = work()
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - raised below, on every rank
            failure = error
        mine = None if failure is None else f"rank {self.global_rank}: {_in_short(failure)}"
        said, results = zip(*all_gather_objects((mine, result)), strict=True)
        if any(said):
            # torch hides the reason of a failed write behind errors of its own: say what would explain it
            free = shutil.disk_usage(path.parent).free / 2**20
            raise CheckpointError(
                f"could not save {path} onto a disk with {free:.0f} MiB free: {'; '.join(filter(None, said))}. Earlier "
                "checkpoints are untouched; make room on the disk or mend it, and resume from the newest of them"
            ) from failure
        return list(results)


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """The state of a one-file checkpoint, into an optimizer over sharded weights. Collective.

    The file numbers the optimizer's weights; which is which says their order.
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
    tidy(partial.parent)
    partial.mkdir()


def _merged(files: Sequence[Files]) -> Files:
    return {name: content for own in files for name, content in own.items()}


def _finish(partial: Path, path: Path, content: FolderContent) -> None:
    """Writes the manifest and puts the folder in its place.

    Raises:
        FileNotFoundError: another rank's file is not there.
    """
    for name, (_, size) in content.files.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != size:
            raise FileNotFoundError(
                f"{name} is not in {partial} as its rank wrote it: all ranks must share that folder"
            )
    write_manifest(partial, [content])
    put_in_place(partial, path)


def _in_short(error: BaseException) -> str:
    """The reason without the stacks of all ranks, which torch's own error holds."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"{_in_short(inner)} on rank {rank}" for rank, (inner, _) in error.failures.items())
    return f"{type(error).__name__}: {error}"
