"""Memory peaks of an optimizer step on one GPU.

Counted are the largest tensors: of activations what autograd keeps of a decoder layer, of sharding what FSDP2 gathers
and reduces, of the loss head its gradient, its copies and a chunk of logits. benchmarks/memory.py measures real steps
of small models beside it; docs/scaling.md has how near it comes.
"""

from __future__ import annotations

from sdzero.losses.matmul import BLOCK_ELEMENTS, CHUNK_SIZE, CUDA_CHUNK_SIZE
from sdzero.pipeline.dry_run.assumptions import Architecture
from sdzero.pipeline.dry_run.memory import FLOAT32, OTHER, Machine, MemoryPeak, Resident
from sdzero.pipeline.dry_run.stage import Config


def layer_bytes(model: Architecture, at: Machine) -> int:
    """Bytes that autograd keeps of one decoder layer per token: norms in float32, projections, queries and keys with
    their norms and rotations, the attention's output, and the gated MLP."""
    h, inner = model.hidden, (model.intermediate, model.queries + model.keys)
    i, qk = (size // at.tensor_parallel for size in inner)
    return 26 * h + 8 * i + 10 * qk if at.compute_bytes == 2 else 24 * h + 16 * i + 16 * qk


def kept_bytes(model: Architecture, num_tokens: int, checkpointing: bool, at: Machine) -> int:
    """Activations kept for the backward pass: those of all layers, or with checkpointing the layers' inputs."""
    stream = at.compute_bytes if at.is_sharded else FLOAT32  # autocast keeps the residual stream in float32
    return num_tokens * model.num_layers * (model.hidden * stream if checkpointing else layer_bytes(model, at))


def layer_backward_bytes(model: Architecture, num_tokens: int, checkpointing: bool, at: Machine) -> int:
    """Bytes that one layer's backward pass adds: gradients inside its MLP and, with checkpointing, recomputed
    activations."""
    inner = 3 * model.intermediate * at.compute_bytes // at.tensor_parallel
    return num_tokens * (inner + (layer_bytes(model, at) if checkpointing else 0))


def root_bytes(model: Architecture, at: Machine) -> int:
    """Embedding, final norm and head as FSDP2 gathers them, in the computation's dtype."""
    return model.num_root_parameters * at.compute_bytes if at.is_sharded else 0


def layers_gathered(model: Architecture, at: Machine) -> int:
    """One layer as FSDP2 gathers it; with tensor parallelism this rank's part of it."""
    return model.num_layer_parameters // at.tensor_parallel * at.compute_bytes if at.is_sharded else 0


def autocast_bytes(model: Architecture, num_layers: int, at: Machine, settings: Config) -> int:
    """Copies that autocast makes of the float32 weights of `num_layers` unsharded layers; embedding and head are not
    copied."""
    needed = not at.is_sharded and at.compute_bytes < FLOAT32 and settings.get("dtype") != "bfloat16"
    return num_layers * model.num_layer_parameters * at.compute_bytes if needed else 0


def logit_bytes(model: Architecture, num_tokens: int, at: Machine, has_teacher: bool) -> int:
    """Logits of a chunk in float32 and their derivatives: on a GPU the gradient in the computation's dtype, on the
    CPU temporaries of a few rows, which are a whole chunk where the vocabulary is small."""
    if not at.on_gpu:
        chunk = min(CHUNK_SIZE, num_tokens) * model.vocab
        rows = min(chunk, max(model.vocab, BLOCK_ELEMENTS))
        return FLOAT32 * (2 * chunk + 4 * rows if has_teacher else chunk + rows)
    gradient = at.compute_bytes if at.compute_bytes < FLOAT32 else 0
    return min(CUDA_CHUNK_SIZE, num_tokens) * model.vocab * (FLOAT32 * (2 if has_teacher else 1) + gradient)


def head_gradient(model: Architecture, at: Machine, settings: Config) -> int:
    """Gradient that the loss head returns for the head's weight, in the dtype of the gathered head or of the
    weights."""
    return 0 if settings.get("lora") else model.vocab * model.hidden * _weight_bytes(at)


def _weight_bytes(at: Machine) -> int:
    return at.compute_bytes if at.is_sharded else FLOAT32


def head_bytes(model: Architecture, num_tokens: int, at: Machine, has_teacher: bool, settings: Config) -> int:
    """Memory of the loss head: copies of the heads in the matmul's dtype, the head's gradient in float32 (unless it
    is frozen), the hidden states and their gradient, and a chunk's logits or, once these are gone, the head's gradient
    as it is returned."""
    head, is_low = model.vocab * model.hidden, at.compute_bytes < FLOAT32
    # gathered in the computation's dtype: on a GPU multiplied as they are; whole in float32: the other way round
    copied_to = at.compute_bytes if at.on_gpu else FLOAT32
    copies = (2 if has_teacher else 1) * copied_to * head if is_low and at.on_gpu != at.is_sharded else 0
    gradient = 0 if settings.get("lora") else FLOAT32 * head
    hidden = num_tokens * model.hidden * (FLOAT32 + (3 if has_teacher else 2) * at.compute_bytes)
    handed_on = head_gradient(model, at, settings) if _weight_bytes(at) < FLOAT32 else 0
    return copies + gradient + hidden + max(logit_bytes(model, num_tokens, at, has_teacher), handed_on)


def num_trained(model: Architecture, settings: Config) -> int:
    """Number of trained parameters under `model.student` of a config: all, or those of its adapters."""
    lora = settings.get("lora")
    return model.num_adapter_parameters(lora) if lora else model.num_parameters


def resident(model: Architecture, teacher: tuple[Architecture, int] | None, at: Machine, settings: Config) -> Resident:
    """Memory that a training keeps from step to step.

    Args:
        model: architecture of the student.
        teacher: its architecture and the bytes of its elements; None without one.
        at: the processes it runs on.
        settings: `model.student` of a config.
    """
    if settings["cpu_offload"]:  # the host's memory holds all of it
        return Resident(0, 0, 0)
    trained = FLOAT32 * num_trained(model, settings)
    frozen = (2 if settings["dtype"] == "bfloat16" else FLOAT32) * model.num_parameters if settings.get("lora") else 0
    theirs = teacher[0].num_parameters * teacher[1] if teacher else 0
    return Resident(*(size // at.num_shards for size in (frozen + trained, 2 * trained, theirs)))


def training_peaks(
    stage: str,
    config: Config,
    model: Architecture,
    teacher: tuple[Architecture, int] | None,
    at: Machine,
    num_tokens: int,
    accumulates: bool,
) -> list[MemoryPeak]:
    """Memory peaks of the largest micro batch (loss head, backward pass) and of the optimizer's step; the engine
    sleeps.

    Args:
        stage: name of the stage.
        config: config of the stage.
        model: architecture of the student.
        teacher: its architecture and the bytes of its elements, 0 for the student's own; None without one.
        at: the processes it runs on.
        num_tokens: tokens of the largest micro batch.
        accumulates: a step has several micro batches on a rank. FSDP then keeps their whole gradients in float32 until
            the last one, unless `reduce_every_micro_batch` is set.
    """
    arguments = config["model"]["init_args"]
    settings, options = arguments["student"], arguments["optimizer"]["init_args"]
    kept = resident(model, teacher, at, settings)
    parts = {**kept.parts, "other": OTHER if at.on_gpu else 0}
    shard = 0 if settings["cpu_offload"] else kept.optimizer // 2
    their_root = root_bytes(model, at) if teacher and teacher[1] else 0  # gathered once and for good
    step = dict(parts)
    if teacher and arguments.get("teacher_first") and at.on_gpu:  # away, all but its head
        step["teacher"] = min(kept.teacher, model.vocab * model.hidden * at.compute_bytes)
    is_whole = accumulates and at.is_sharded and not arguments.get("reduce_every_micro_batch")
    step["gradients"] = whole_gradients(model, at, settings) if is_whole else shard
    # torch's default on a GPU works on all weights at once, and so holds a square root of them all
    at_once = at.on_gpu and not options.get("fused") and options.get("foreach") is not False
    return [
        MemoryPeak(
            stage, "loss", {**step, **_at_loss(model, at, num_tokens, settings, teacher is not None, their_root)}
        ),
        MemoryPeak(stage, "backward", {**step, **_in_backward(model, at, num_tokens, settings, their_root)}),
        MemoryPeak(stage, "update", {**parts, "gradients": shard, "copies": their_root + (shard if at_once else 0)}),
    ]


def whole_gradients(model: Architecture, at: Machine, settings: Config) -> int:
    """Unreduced float32 gradients under FSDP2; with tensor parallelism those of this rank's part of the layers."""
    if settings.get("lora"):
        return FLOAT32 * num_trained(model, settings)
    layers = model.num_layers * model.num_layer_parameters // at.tensor_parallel
    return FLOAT32 * (layers + model.num_root_parameters)


def _at_loss(
    model: Architecture, at: Machine, num_tokens: int, settings: Config, has_teacher: bool, their_root: int
) -> dict[str, int]:
    gathered = root_bytes(model, at) + layers_gathered(model, at)  # the last layer's buffer still lies there
    return {
        "copies": their_root + gathered + autocast_bytes(model, model.num_layers, at, settings),
        "activations": kept_bytes(model, num_tokens, settings["gradient_checkpointing"], at),
        "loss head": head_bytes(model, num_tokens, at, has_teacher, settings),
    }


def _in_backward(
    model: Architecture, at: Machine, num_tokens: int, settings: Config, their_root: int
) -> dict[str, int]:
    """Larger peak of the backward pass's two ends. At the last layer all activations are kept, a layer is recomputed
    while another one is gathered, and a layer's gradient is reduced. At the embedding no activations are left, and the
    root's gradients are whole."""
    trains, checkpointing = not settings.get("lora"), settings["gradient_checkpointing"]
    is_sharded, gathered = at.is_sharded, layers_gathered(model, at)
    reduced = FLOAT32 if is_sharded and trains else 0  # bytes of an element on its way to the other ranks
    roots = their_root + root_bytes(model, at)
    autocast = autocast_bytes(model, 1 if checkpointing else model.num_layers, at, settings)
    layer = model.num_layer_parameters // at.tensor_parallel
    passed_on = head_gradient(model, at, settings) + num_tokens * model.hidden * at.compute_bytes
    first = {
        "copies": roots + 2 * gathered + autocast + layer * ((_weight_bytes(at) if trains else 0) + reduced),
        "activations": kept_bytes(model, num_tokens, checkpointing, at)
        + layer_backward_bytes(model, num_tokens, checkpointing, at),
        "loss head": passed_on,
    }
    root_gradients = model.num_root_parameters * (_weight_bytes(at) + reduced) if trains else 0
    last = {"copies": roots + root_gradients, "activations": 0, "loss head": head_gradient(model, at, settings)}
    return max((first, last), key=lambda parts: sum(parts.values()))
