"""Parts for Lightning's Trainer: strategies, checkpoints, RNG state, collectives."""

from sdzero.trainer.checkpoint_io import AtomicCheckpointIO
from sdzero.trainer.strategies import FSDP, FullShard

__all__ = ["FSDP", "AtomicCheckpointIO", "FullShard"]
