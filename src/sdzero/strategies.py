"""Strategies for the Trainer: FSDP2 over as many processes as there are."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy


class FullShard(ModelParallelStrategy):
    """FSDP2: student and teacher are each sharded, decoder layer by decoder layer, over all processes of all nodes.

    Lightning's own `data_parallel_size: auto` is the number of nodes. This is the whole number of processes, so that
    one config serves one device and a cluster.

    Args:
        save_distributed_checkpoint: each rank writes its shard; else rank 0 gathers all into one file.
        timeout_minutes: limit of one collective operation. Ranks whose responses take longer keep the others waiting.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, timeout_minutes: float = 120.0) -> None:
        timeout: Any = timedelta(minutes=timeout_minutes)
        super().__init__(1, 1, save_distributed_checkpoint, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
