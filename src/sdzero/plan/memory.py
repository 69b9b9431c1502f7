"""Memory per GPU of each stage, at the moments at which it is largest. A model of it: nothing here is measured.

Trained weights, their gradients and AdamW's two moments are float32. What stands between them is counted by its largest
tensors: activations by what autograd keeps of a decoder layer, the loss head by its copies and chunks of logits, the
engine as vLLM sizes itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdzero.plan.assumptions import Architecture, Config
from sdzero.products import CHUNK_SIZE, CUDA_CHUNK_SIZE

GIB = 2**30
FLOAT32 = 4
OTHER = 2 * GIB
"""An allowance: the CUDA context, NCCL's buffers, fragments, and what a sleeping vLLM keeps."""
BATCHED_TOKENS = 16384
"""Tokens that vLLM's scheduler takes at once on a GPU of 70 GiB and more: the largest of its defaults."""


@dataclass(frozen=True)
class Machine:
    """What a stage runs on.

    Attributes:
        on_gpu: False on the CPU.
        world_size: processes, one a GPU.
        num_shards: over how many processes a model is sharded; 1: each holds all of it.
        compute_bytes: of an element in the computation: 2 under bf16-mixed, else 4.
    """

    on_gpu: bool
    world_size: int
    num_shards: int
    compute_bytes: int


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
class Moment:
    """Bytes of one GPU at one moment of a stage, by what they are for.

    Attributes:
        stage: name of the stage.
        name: `backward`, `update` (the optimizer's step) or `rollout`.
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
    """Of a stage's trainer; collection, which has none, names its devices itself and trains nothing."""
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
    num_shards = 1
    if kind in ("FullShard", "FSDP", "FSDPStrategy", "fsdp"):
        num_shards = world_size
    elif kind == "ModelParallelStrategy":
        size = strategy.get("init_args", {}).get("data_parallel_size", "auto")
        num_shards = nodes if size == "auto" else int(size)  # as Lightning reads "auto"
    return Machine(on_gpu, world_size, num_shards, 2 if "bf16" in str(trainer["precision"]) else FLOAT32)


def cache_bytes(model: Architecture, num_tokens: int, dtype_bytes: int, tensor_parallel_size: int = 1) -> int:
    """Keys and values of one sequence on one GPU. A sliding layer holds its window and what vLLM takes at once."""
    per_layer = 2 * model.keys * dtype_bytes // min(tensor_parallel_size, model.num_key_heads)
    in_window = min(num_tokens, model.window - 1 + BATCHED_TOKENS)
    full = model.num_layers - model.num_sliding_layers
    return per_layer * (full * num_tokens + model.num_sliding_layers * in_window)


def layer_bytes(model: Architecture, compute_bytes: int) -> int:
    """What autograd keeps of one decoder layer per token: norms in float32, projections, queries and keys with their
    norms and rotations, the attention's output, and the gated MLP."""
    h, i, qk = model.hidden, model.intermediate, model.queries + model.keys
    return 26 * h + 8 * i + 10 * qk if compute_bytes == 2 else 24 * h + 16 * i + 16 * qk


def activation_bytes(model: Architecture, num_tokens: int, checkpointing: bool, at: Machine) -> int:
    """Of a micro batch in its backward pass: with checkpointing the layers' inputs and one layer that is made anew."""
    stream = at.compute_bytes if at.num_shards > 1 else FLOAT32  # autocast keeps the residual stream in float32
    layer = layer_bytes(model, at.compute_bytes)
    kept = model.num_layers * model.hidden * stream + layer if checkpointing else model.num_layers * layer
    return num_tokens * (kept + 3 * model.intermediate * at.compute_bytes)  # and the gradients inside the MLP


def gathered_bytes(model: Architecture, at: Machine, num_roots: int, settings: Config) -> int:
    """Copies of weights in the computation's dtype: sharded, the roots (embedding and head) and two layers, with a
    layer's gradient; unsharded, what autocast keeps of each weight. Frozen ones have no gradient."""
    if at.num_shards == 1:
        is_copied = at.compute_bytes < FLOAT32 and settings.get("dtype") != "bfloat16"
        return model.num_parameters * at.compute_bytes if is_copied else 0
    gradient = 0 if settings.get("lora") else FLOAT32
    roots = num_roots * model.num_root_parameters * at.compute_bytes
    return roots + model.num_layer_parameters * (3 * at.compute_bytes + gradient)


def logit_bytes(model: Architecture, num_tokens: int, at: Machine, has_teacher: bool) -> int:
    """A chunk's logits in float32 and what is made of them: on a GPU the gradient in the computation's dtype, on the
    CPU temporaries of a few rows, which are a whole chunk where the vocabulary is small."""
    if not at.on_gpu:
        return min(CHUNK_SIZE, num_tokens) * model.vocab * FLOAT32 * (6 if has_teacher else 2)
    gradient = at.compute_bytes if at.compute_bytes < FLOAT32 else 0
    return min(CUDA_CHUNK_SIZE, num_tokens) * model.vocab * (FLOAT32 * (2 if has_teacher else 1) + gradient)


def head_bytes(model: Architecture, num_tokens: int, at: Machine, has_teacher: bool, is_frozen: bool) -> int:
    """Of the loss head: copies of the heads in what they are multiplied in, the head's gradient (unless it is frozen)
    in float32 and as it is handed on, the hidden states' gradient, and a chunk's logits."""
    head = model.vocab * model.hidden
    low, is_sharded = at.compute_bytes < FLOAT32, at.num_shards > 1
    # gathered in the computation's dtype: on a GPU multiplied as they are; whole in float32: the other way round
    copied_to = at.compute_bytes if at.on_gpu else FLOAT32
    copies = (2 if has_teacher else 1) * copied_to * head if low and at.on_gpu != is_sharded else 0
    gradient = 0 if is_frozen else FLOAT32 * head + (at.compute_bytes * head if low and is_sharded else 0)
    hidden = num_tokens * model.hidden * (FLOAT32 + (3 if has_teacher else 2) * at.compute_bytes)
    return copies + gradient + hidden + logit_bytes(model, num_tokens, at, has_teacher)


@dataclass(frozen=True)
class Resident:
    """What a training keeps on a GPU from step to step, in bytes."""

    weights: int
    optimizer: int
    teacher: int

    @property
    def parts(self) -> dict[str, int]:
        return {"weights": self.weights, "optimizer": self.optimizer, "teacher": self.teacher}


def num_trained(model: Architecture, settings: Config) -> int:
    """Parameters that train under `model.model` of a config: all, or its adapters'."""
    lora = settings.get("lora")
    return model.num_adapter_parameters(lora) if lora else model.num_parameters


def resident(model: Architecture, teacher: tuple[Architecture, int] | None, at: Machine, settings: Config) -> Resident:
    """Args: teacher: its sizes and the bytes of its elements; settings: of the student, `model.model` of a config."""
    if settings["cpu_offload"]:  # the host's memory holds all of it
        return Resident(0, 0, 0)
    trained = FLOAT32 * num_trained(model, settings)
    frozen = (2 if settings["dtype"] == "bfloat16" else FLOAT32) * model.num_parameters if settings.get("lora") else 0
    theirs = teacher[0].num_parameters * teacher[1] if teacher else 0
    return Resident(*(size // at.num_shards for size in (frozen + trained, 2 * trained, theirs)))


def training_moments(
    stage: str,
    config: Config,
    model: Architecture,
    teacher: tuple[Architecture, int] | None,
    at: Machine,
    num_tokens: int,
    accumulates: bool,
) -> list[Moment]:
    """The backward pass of the largest micro batch, and the optimizer's step; the engine sleeps.

    Args:
        stage: name of the stage.
        config: of the stage.
        model: the student.
        teacher: its sizes and the bytes of its elements, 0 where they are the student's own; None without one.
        at: what it runs on.
        num_tokens: of the largest micro batch.
        accumulates: a step has several micro batches on a rank. FSDP then keeps their whole gradients in float32 until
            the last one, as they are reduced once a step.
    """
    arguments = config["model"]["init_args"]
    settings, options = arguments["model"], arguments["optimizer"]["init_args"]
    kept = resident(model, teacher, at, settings)
    whole = FLOAT32 * num_trained(model, settings)
    shard = kept.optimizer // 2
    num_roots = 2 if teacher and teacher[1] else 1
    gradients = whole if accumulates and at.num_shards > 1 else shard
    backward = {
        "gradients": gradients,
        "copies": gathered_bytes(model, at, num_roots, settings),
        "activations": activation_bytes(model, num_tokens, settings["gradient_checkpointing"], at),
        "loss head": head_bytes(model, num_tokens, at, teacher is not None, bool(settings.get("lora"))),
    }
    # torch's default on a GPU works on all weights at once, and so holds a square root of them all
    at_once = at.on_gpu and not options.get("fused") and options.get("foreach") is not False
    update = {"gradients": shard, "copies": shard if at_once else 0}
    other = {"other": OTHER if at.on_gpu else 0}
    parts = kept.parts
    if teacher and arguments.get("teacher_first") and at.on_gpu:  # away, all but its head
        parts["teacher"] = min(kept.teacher, model.vocab * model.hidden * at.compute_bytes)
    return [
        Moment(stage, "backward", {**parts, **backward, **other}),
        Moment(stage, "update", {**parts, **update, **other}),
    ]


def engine(
    spec: Mapping[str, Any], dtype: str, model: Architecture, at: Machine, longest: int, mean: int, memory: int | None
) -> Engine | None:
    """The engine of a stage; None where its class is none of ours, or where the GPU's memory is not known.

    Args:
        spec: the engine's class_path and init_args.
        dtype: of its weights.
        model: the policy.
        at: what it runs on.
        longest: tokens of the longest sequence.
        mean: tokens of a mean one; 0: not known.
        memory: bytes of a GPU.
    """
    kind, options = spec["class_path"].rpartition(".")[2], spec.get("init_args", {})
    dtype_bytes = 2 if dtype == "bfloat16" else FLOAT32
    tensor_parallel = options.get("tensor_parallel_size", 1)
    weights = model.num_parameters * dtype_bytes // tensor_parallel
    per_longest = cache_bytes(model, longest, dtype_bytes, tensor_parallel)
    per_mean = cache_bytes(model, mean, dtype_bytes, tensor_parallel) if mean else 0
    if kind == "TransformersEngine":
        cache = options["max_batch_size"] * per_longest
        return Engine(weights + cache, weights, longest, None, per_longest, per_mean)
    if kind != "VLLMEngine" or (at.on_gpu and memory is None):
        return None
    if not at.on_gpu:
        cache = int(options["kv_cache_gib"] * GIB)
        return Engine(weights + cache, weights, longest, cache, per_longest, per_mean)
    size = int(options["gpu_memory_utilization"] * (memory or 0))
    # what vLLM's trial run takes: the MLP of all tokens it may take at once, and the sampler's logits
    trial = BATCHED_TOKENS * (3 * model.intermediate + 4 * model.hidden) * dtype_bytes // tensor_parallel
    trial += 3 * options["max_num_seqs"] * model.vocab * FLOAT32
    return Engine(size, weights, longest, size - weights - trial, per_longest, per_mean)


def rollout_moment(
    stage: str, model: Architecture, kept: Resident | None, at: Machine, beside: Engine, longest_response: int
) -> Moment:
    """Sampling: what a training keeps, the engine, and the trainer's check of a longest response's log-probabilities
    while the engine is awake. `kept` None: collection, which has no trainer."""
    parts = {**(kept.parts if kept else {}), "engine": beside.size}
    if kept:
        per_token = 8 * model.hidden + 3 * model.intermediate * at.compute_bytes
        parts["activations"] = longest_response * per_token + logit_bytes(model, longest_response, at, False)
        parts["copies"] = gathered_bytes(model, at, 1, {}) if at.num_shards > 1 else 0
    parts["other"] = OTHER if at.on_gpu else 0
    return Moment(stage, "rollout", parts, beside)
