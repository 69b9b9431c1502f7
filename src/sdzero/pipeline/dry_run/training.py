"""Memory peaks of an optimizer step on one GPU.

Counted are the largest tensors: of activations what autograd keeps of a decoder layer, of sharding what FSDP2 gathers
and reduces, of the loss head its gradient, its copies and a chunk of logits. benchmarks/memory.py measures real steps
of small models beside it; docs/scaling.md has how near it comes.
"""

from __future__ import annotations

from sdzero.losses.matmul import BLOCK_ELEMENTS, CHUNK_SIZE, CUDA_CHUNK_SIZE
from sdzero.pipeline.dry_run.assumptions import Architecture
from sdzero.pipeline.dry_run.memory import FLOAT32, OTHER, Machine, MemoryPeak
from sdzero.utils.yaml_config import Config


def gathered_bytes(model: Architecture, at: Machine) -> tuple[int, int]:
    """Return what FSDP2 gathers, in the computation's dtype: embedding, final norm and head; and one layer, with tensor
    parallelism this rank's part of it."""
    size = at.compute_bytes if at.is_sharded else 0
    return model.num_root_parameters * size, model.num_layer_parameters // at.tensor_parallel * size


def logit_bytes(model: Architecture, num_tokens: int, at: Machine, has_teacher: bool) -> int:
    """Return the bytes of a chunk's float32 logits and their derivatives: on a GPU the gradient in the computation's
    dtype, on the CPU temporaries of a few rows, which are a whole chunk where the vocabulary is small."""
    if not at.on_gpu:
        chunk = min(CHUNK_SIZE, num_tokens) * model.vocab
        rows = min(chunk, max(model.vocab, BLOCK_ELEMENTS))
        return FLOAT32 * (2 * chunk + 4 * rows if has_teacher else chunk + rows)
    gradient = at.compute_bytes if at.compute_bytes < FLOAT32 else 0
    return min(CUDA_CHUNK_SIZE, num_tokens) * model.vocab * (FLOAT32 * (1 + has_teacher) + gradient)


class MicroBatch:
    """Largest tensors of a micro batch, in bytes. `settings`: `model.student` of a config; `their_root`: what the
    teacher has gathered once and for good."""

    def __init__(
        self, model: Architecture, at: Machine, num_tokens: int, settings: Config, has_teacher: bool, their_root: int
    ) -> None:
        self.model, self.at, self.num_tokens, self.has_teacher = model, at, num_tokens, has_teacher
        self.trains, self.checkpointing = not settings.get("lora"), settings["gradient_checkpointing"]
        self.is_low = at.compute_bytes < FLOAT32
        self.is_cast = self.is_low and not at.is_sharded and settings.get("dtype") != "bfloat16"
        self.root, self.layer = gathered_bytes(model, at)
        self.roots = their_root + self.root
        # an element of a weight as the computation finds it: gathered in its dtype, or the float32 original
        self.element = at.compute_bytes if at.is_sharded else FLOAT32
        # what autograd keeps of one layer per token: norms in float32, projections, queries and keys with their norms
        # and rotations, the attention's output, and the gated MLP
        h, inner = model.hidden, (model.intermediate, model.queries + model.keys)
        i, qk = (size // at.tensor_parallel for size in inner)
        self.layer_per_token = 26 * h + 8 * i + 10 * qk if at.compute_bytes == 2 else 24 * h + 16 * i + 16 * qk
        # kept until the backward pass; autocast keeps the residual stream in float32
        per_layer = h * self.element if self.checkpointing else self.layer_per_token
        self.activations = num_tokens * model.num_layers * per_layer
        # returned by the loss head for its weight
        self.head_gradient = model.vocab * h * self.element if self.trains else 0

    def _autocast(self, num_layers: int) -> int:
        """Copies that autocast makes of the float32 weights of unsharded layers; embedding and head are not copied."""
        return num_layers * self.model.num_layer_parameters * self.at.compute_bytes if self.is_cast else 0

    def at_loss(self) -> dict[str, int]:
        """The end of the forward pass. The loss head takes copies of the heads in the matmul's dtype, its gradient in
        float32, the hidden states and their gradient, and a chunk's logits or, once these are gone, the gradient as it
        is returned."""
        at, head, num_models = self.at, self.model.vocab * self.model.hidden, 1 + self.has_teacher
        # gathered in the computation's dtype: on a GPU multiplied as they are; whole in float32: the other way round
        copied_to = at.compute_bytes if at.on_gpu else FLOAT32
        copies = num_models * head * copied_to if self.is_low and at.on_gpu != at.is_sharded else 0
        gradient = FLOAT32 * head if self.trains else 0
        hidden = self.num_tokens * self.model.hidden * (FLOAT32 + (1 + num_models) * at.compute_bytes)
        logits = logit_bytes(self.model, self.num_tokens, at, self.has_teacher)
        returned = self.head_gradient if self.element < FLOAT32 else 0
        return {
            # the last layer's buffer still lies there
            "copies": self.roots + self.layer + self._autocast(self.model.num_layers),
            "activations": self.activations,
            "loss head": copies + gradient + hidden + max(logits, returned),
        }

    def in_backward(self) -> dict[str, int]:
        """Larger peak of the backward pass's two ends. At the last layer all activations are kept, a layer is
        recomputed while another one is gathered, and a layer's gradient is reduced. At the embedding no activations
        are left, and the root's gradients are whole."""
        model, at = self.model, self.at
        # of an element: its gradient, and its float32 copy on its way to the other ranks
        gradient = self.element + (FLOAT32 if at.is_sharded else 0) if self.trains else 0
        autocast = self._autocast(1 if self.checkpointing else model.num_layers)
        inner = 3 * model.intermediate * at.compute_bytes // at.tensor_parallel  # gradients inside the MLP
        recomputed = self.layer_per_token if self.checkpointing else 0
        layer = model.num_layer_parameters // at.tensor_parallel
        first = {
            "copies": self.roots + 2 * self.layer + autocast + layer * gradient,
            "activations": self.activations + self.num_tokens * (inner + recomputed),
            "loss head": self.head_gradient + self.num_tokens * model.hidden * at.compute_bytes,
        }
        copies = self.roots + model.num_root_parameters * gradient
        last = {"copies": copies, "activations": 0, "loss head": self.head_gradient}
        return max((first, last), key=lambda parts: sum(parts.values()))


def resident(
    model: Architecture, teacher: tuple[Architecture, int] | None, at: Machine, settings: Config
) -> dict[str, int]:
    """Return the bytes of weights, optimizer and teacher that a training keeps from step to step.

    Arguments as for `training_peaks`; `settings` is `model.student` of a config.
    """
    trained = FLOAT32 * model.num_trained(settings)
    frozen = (2 if settings["dtype"] == "bfloat16" else FLOAT32) * model.num_parameters if settings.get("lora") else 0
    theirs = teacher[0].num_parameters * teacher[1] if teacher else 0
    sizes = {"weights": frozen + trained, "optimizer": 2 * trained, "teacher": theirs}
    # with cpu_offload the host's memory holds all of it
    return {part: 0 if settings["cpu_offload"] else size // at.num_shards for part, size in sizes.items()}


def training_peaks(
    stage: str,
    config: Config,
    model: Architecture,
    teacher: tuple[Architecture, int] | None,
    at: Machine,
    num_tokens: int,
    accumulates: bool,
) -> list[MemoryPeak]:
    """Return the memory peaks of the largest micro batch (loss head, backward pass) and of the optimizer's step; the
    engine sleeps.

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
    their_root = gathered_bytes(model, at)[0] if teacher and teacher[1] else 0
    batch = MicroBatch(model, at, num_tokens, settings, teacher is not None, their_root)
    parts = {**resident(model, teacher, at, settings), "other": OTHER if at.on_gpu else 0}
    shard = parts["optimizer"] // 2
    step = {**parts, "gradients": shard}
    if teacher and arguments.get("teacher_first") and at.on_gpu:  # away, all but its head
        step["teacher"] = min(parts["teacher"], model.vocab * model.hidden * at.compute_bytes)
    if accumulates and at.is_sharded and not arguments.get("reduce_every_micro_batch"):
        whole = model.num_layers * model.num_layer_parameters // at.tensor_parallel + model.num_root_parameters
        step["gradients"] = FLOAT32 * (whole if batch.trains else model.num_trained(settings))
    # torch's default on a GPU works on all weights at once, and so holds a square root of them all
    at_once = at.on_gpu and not options.get("fused") and options.get("foreach") is not False
    update = {**parts, "gradients": shard, "copies": their_root + (shard if at_once else 0)}
    passes = {"loss": {**step, **batch.at_loss()}, "backward": {**step, **batch.in_backward()}, "update": update}
    return [MemoryPeak(stage, name, peak) for name, peak in passes.items()]
