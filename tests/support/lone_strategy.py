"""Strategy that saves sharded checkpoints in a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from sdzero.trainer.sharded_checkpoint import AtomicFolders


class Plain(ParallelStrategy):
    """Saves as Lightning's sharded strategies do, in a single process."""

    root_device = torch.device("cpu")  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    global_rank, world_size, is_global_zero = 0, 1, True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def model_to_device(self) -> None: ...
    def barrier(self, name: str | None = None) -> None: ...
    def all_gather(self, *args: Any, **kwargs: Any) -> Any: ...
    def reduce(self, *args: Any, **kwargs: Any) -> Any: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        state_dict_saver.save({"state_dict": checkpoint.pop("state_dict")}, checkpoint_id=filepath, no_dist=True)
        torch.save(checkpoint, Path(filepath) / "meta.pt")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        state = {"state_dict": {"weights": torch.zeros(1000)}}
        state_dict_loader.load(state, checkpoint_id=checkpoint_path, no_dist=True)
        return {**state, **torch.load(Path(checkpoint_path) / "meta.pt")}


class Lone(AtomicFolders, Plain):
    """`Plain` with atomic checkpoints."""


def save(folder: Path, step: int, name: str | None = None) -> Path:
    path = folder / (name or f"step={step}.ckpt")
    Lone().save_checkpoint({"global_step": step, "state_dict": {"weights": torch.full((1000,), float(step))}}, path)
    return path
