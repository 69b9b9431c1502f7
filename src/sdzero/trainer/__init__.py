"""Parts for Lightning's Trainer: strategies, checkpoints, RNG state, collectives.

The classes are imported on first use: collection needs `sdzero.trainer.shares`, but not Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdzero.trainer.checkpoint_io import AtomicCheckpointIO
    from sdzero.trainer.strategies import FSDP, FullShard

__all__ = ["FSDP", "AtomicCheckpointIO", "FullShard"]

_MODULES = {"AtomicCheckpointIO": "checkpoint_io", "FSDP": "strategies", "FullShard": "strategies"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
