"""Processes of a stage, and memory peaks per GPU. Arithmetic: nothing here is measured.

Trained weights, their gradients and AdamW's two moments are float32. Between
them the largest tensors are counted: `training` has those of the step, `sampling` those of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdzero.utils.yaml_config import Config

GIB = 2**30
FLOAT32 = 4
OTHER = 2 * GIB
"""An allowance: the CUDA context, NCCL's buffers, fragments, and what a sleeping vLLM keeps."""


@dataclass(frozen=True)
class Machine:
    """Processes of a stage and how they share a model."""

    on_gpu: bool
    world_size: int  # processes, one a GPU
    num_shards: int  # processes that share a model; 1: each holds all of it
    compute_bytes: int  # of an element in the computation: 2 under bf16-mixed, else 4
    tensor_parallel: int = 1  # neighbouring processes that compute a batch together
    wrapped: bool = False  # by FSDP, which gathers layer by layer on one process too

    @property
    def is_sharded(self) -> bool:
        return self.wrapped or self.num_shards > 1


@dataclass(frozen=True)
class Engine:
    """A rollout engine beside the trainer. Sizes are in bytes."""

    size: int
    weights: int
    longest: int  # tokens of the longest sequence it must hold, prompt and all
    cache: int | None  # left for keys and values; None: it takes what it needs
    per_longest: int  # keys and values of the longest sequence
    per_mean: int  # the same of a sequence of mean length; 0: not known


@dataclass(frozen=True)
class MemoryPeak:
    """Memory of one GPU at one peak of a stage, in bytes by purpose."""

    stage: str
    name: str  # `loss` (the forward pass's end), `backward`, `update` (the optimizer's step) or `rollout`
    parts: Mapping[str, int]
    engine: Engine | None = None  # of a rollout

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def machine(config: Config, num_gpus: int | None) -> Machine:
    """Return the machine of a stage's trainer, or of a collection, which has its own devices and trains nothing."""
    trainer = config.get("trainer") or {"accelerator": "auto", "strategy": "auto", "precision": "32-true", **config}
    on_gpu = trainer["accelerator"] in ("gpu", "cuda") or (trainer["accelerator"] == "auto" and num_gpus is not None)
    devices, nodes, strategy = trainer["devices"], trainer["num_nodes"], trainer["strategy"]
    if isinstance(devices, list):
        world_size = len(devices) * nodes
    elif str(devices) in ("auto", "-1"):
        world_size = (num_gpus or 1) if on_gpu else 1
    else:
        world_size = int(devices) * nodes
    is_class = isinstance(strategy, Mapping)
    kind = strategy["class_path"].rpartition(".")[2] if is_class else str(strategy)
    options = strategy.get("init_args", {}) if is_class else {}
    wrapped = kind in ("FullShard", "FSDP", "FSDPStrategy", "fsdp")
    num_shards = world_size if wrapped else 1
    if kind == "ModelParallelStrategy":
        size = options.get("data_parallel_size", "auto")
        num_shards = nodes if size == "auto" else int(size)  # as Lightning reads "auto"
    return Machine(
        on_gpu,
        world_size,
        num_shards,
        compute_bytes=2 if "bf16" in str(trainer["precision"]) else FLOAT32,
        tensor_parallel=options.get("tensor_parallel_size", 1) if kind == "FullShard" else 1,
        wrapped=wrapped,
    )
