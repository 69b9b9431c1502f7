"""Memory peaks per GPU of each stage. Arithmetic: nothing here is measured.

Trained weights, their gradients and AdamW's two moments are float32. Between
them the largest tensors are counted: `training` has those of the step, `sampling` those of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdzero.pipeline.dry_run.stage import Config

GIB = 2**30
FLOAT32 = 4
OTHER = 2 * GIB
"""An allowance: the CUDA context, NCCL's buffers, fragments, and what a sleeping vLLM keeps."""


@dataclass(frozen=True)
class Machine:
    """Processes of a stage and how they share a model.

    Attributes:
        on_gpu: False on the CPU.
        world_size: processes, one a GPU.
        num_shards: processes that share a model; 1: each holds all of it.
        compute_bytes: bytes of an element in the computation: 2 under bf16-mixed, else 4.
        tensor_parallel: neighbouring processes that compute a batch together.
        wrapped: by FSDP, which gathers layer by layer on one process too.
    """

    on_gpu: bool
    world_size: int
    num_shards: int
    compute_bytes: int
    tensor_parallel: int = 1
    wrapped: bool = False

    @property
    def is_sharded(self) -> bool:
        return self.wrapped or self.num_shards > 1


@dataclass(frozen=True)
class Engine:
    """A rollout engine beside the trainer.

    Attributes:
        size: bytes it takes.
        weights: of its weights.
        longest: tokens of the longest sequence it must hold, prompt and all.
        cache: bytes left for keys and values; None: it takes what it needs.
        per_longest: bytes of the longest sequence's keys and values.
        per_mean: the same of a sequence of mean length; 0: not known.
    """

    size: int
    weights: int
    longest: int
    cache: int | None
    per_longest: int
    per_mean: int


@dataclass(frozen=True)
class MemoryPeak:
    """Memory of one GPU at one peak of a stage, in bytes by purpose.

    Attributes:
        stage: name of the stage.
        name: `loss` (the loss head, the forward pass's last), `backward`, `update` (the optimizer's step) or `rollout`.
        parts: heading -> bytes.
        engine: of a rollout.
    """

    stage: str
    name: str
    parts: dict[str, int] = field(default_factory=dict)
    engine: Engine | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def machine(config: Config, num_gpus: int | None) -> Machine:
    """Machine of a stage's trainer, or of a collection, which has devices of its own and trains nothing."""
    trainer = config.get("trainer") or {"accelerator": "auto", "strategy": "auto", "precision": "32-true", **config}
    on_gpu = trainer["accelerator"] in ("gpu", "cuda") or (trainer["accelerator"] == "auto" and num_gpus is not None)
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    if isinstance(devices, list):
        world_size = len(devices) * nodes
    elif str(devices) in ("auto", "-1"):
        world_size = (num_gpus or 1) if on_gpu else 1
    else:
        world_size = int(devices) * nodes
    strategy = trainer["strategy"]
    kind = strategy["class_path"].rpartition(".")[2] if isinstance(strategy, Mapping) else str(strategy)
    num_shards, tensor_parallel = 1, 1
    wrapped = kind in ("FullShard", "FSDP", "FSDPStrategy", "fsdp")
    if wrapped:
        num_shards = world_size
        tensor_parallel = strategy.get("init_args", {}).get("tensor_parallel_size", 1) if kind == "FullShard" else 1
    elif kind == "ModelParallelStrategy":
        size = strategy.get("init_args", {}).get("data_parallel_size", "auto")
        num_shards = nodes if size == "auto" else int(size)  # as Lightning reads "auto"
    compute_bytes = 2 if "bf16" in str(trainer["precision"]) else FLOAT32
    return Machine(on_gpu, world_size, num_shards, compute_bytes, tensor_parallel, wrapped)


@dataclass(frozen=True)
class Resident:
    """Memory that a training keeps on a GPU from step to step, in bytes."""

    weights: int
    optimizer: int
    teacher: int

    @property
    def parts(self) -> dict[str, int]:
        return {"weights": self.weights, "optimizer": self.optimizer, "teacher": self.teacher}
