"""A model over several processes: tensor parallelism, FSDP2, FSDP1 and DDP; every test of a strategy's type is here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from sdzero.models.language_model import LanguageModel, ModelConfig
from sdzero.models.lora import Lora

if TYPE_CHECKING:  # collection, which hashes weights, does without Lightning
    from sdzero.trainer.shares import Share

# The styles of transformers' own plans as torch's classes. Modules not in a plan are replicated.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    # around a norm over all heads of a token
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    # a norm over single heads, [B, T, heads, head size]: each rank has its own heads, so gradients are summed
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}


def check_parallel(config: ModelConfig, hf_config: Any, strategy: Any, num_members: int) -> None:
    """Check a model against the Trainer's strategy, before any weights are read. Raises: ValueError as below."""
    check_adapters(config.lora, config.dtype, strategy)
    check_tensor_parallel(hf_config, num_members)


def check_adapters(lora: Lora | None, dtype: str, strategy: Any) -> None:
    """Raise ValueError if the strategy does not support adapters beside weights of that dtype."""
    if lora is None:
        return
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    if isinstance(strategy, ModelParallelStrategy) and int(strategy._tensor_parallel_size) > 1:
        raise ValueError("student.lora: adapters have no tensor-parallel plan: set tensor_parallel_size to 1")
    if isinstance(strategy, FSDPStrategy) and dtype != "float32":
        raise ValueError(
            "student.lora: FSDPStrategy needs weights and adapters of one dtype: set student.dtype=float32, or use "
            "sdzero.trainer.FullShard as trainer.strategy"
        )


def check_tensor_parallel(hf_config: Any, size: int) -> None:
    """Raise ValueError if a model of this Hugging Face config cannot be split over `size` ranks."""
    if size == 1:
        return
    subject = f"strategy.tensor_parallel_size={size}: {hf_config.model_type}"
    plan = _plan(hf_config)
    if not plan:
        raise ValueError(f"{subject} has no plan for tensor parallelism in transformers: set it to 1")
    if unknown := sorted(set(plan.values()) - STYLES.keys()):
        raise ValueError(f"{subject} needs {', '.join(unknown)}, which is not supported: set it to 1")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (count := getattr(hf_config, name, None) or 0) % size:
            raise ValueError(f"{subject} has {name}={count}, which it does not divide: choose another size")


def _plan(hf_config: Any) -> dict[str, str]:
    """Return the style by module. Embedding, final norm and head are replicated: the losses need the full head."""
    plan = getattr(hf_config, "base_model_tp_plan", None) or {}
    return {name: style for name, style in plan.items() if name.startswith("layers.")}


def shard(model: LanguageModel, config: ModelConfig, strategy: Any, compute_dtype: torch.dtype | None) -> nn.Module:
    """Wrap a model as the Trainer's strategy requires; unchanged on one device and under DDP.

    FSDP wraps the model here, not the LightningModule, which holds a student and a teacher (lightning#19626).
    """
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    if isinstance(strategy, ModelParallelStrategy):
        return shard_fsdp2(model, config, strategy.device_mesh, compute_dtype)
    if isinstance(strategy, FSDPStrategy):
        return shard_fsdp1(model, config, strategy.root_device, compute_dtype)
    return model


def _layers(model: LanguageModel, config: ModelConfig) -> list[nn.Module]:
    names = set(config.layer_classes or model.hf._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise ValueError(f"student.layer_classes: no layer of {sorted(names)} in {type(model.hf).__name__}")
    return layers


def shard_fsdp2(
    model: LanguageModel, config: ModelConfig, mesh: DeviceMesh, compute_dtype: torch.dtype | None
) -> nn.Module:
    """Shard every decoder layer and the root; the root stays gathered after its forward pass, head included.

    `mesh` is two-dimensional, data_parallel x tensor_parallel. Layers are first split by transformers' own plan and
    then sharded over the ranks with the same split; the root, which is not split, is sharded over all ranks.
    """
    layer_mesh = root_mesh = mesh["data_parallel"]
    if mesh["tensor_parallel"].size() > 1:
        plan = {name: STYLES[style]() for name, style in _plan(model.hf.config).items()}
        # all ranks loaded the same weights: none are sent
        parallelize_module(model.hf.get_decoder(), mesh["tensor_parallel"], plan, src_data_rank=None)
        root_mesh = mesh._flatten("all_ranks")
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(mesh.device_type != "cpu") if config.cpu_offload else OffloadPolicy(),
    }
    for layer in _layers(model, config):
        fully_shard(layer, mesh=layer_mesh, **options)
    fully_shard(model, mesh=root_mesh, reshard_after_forward=False, **options)  # in place
    return model


def shard_fsdp1(
    model: LanguageModel, config: ModelConfig, device: torch.device, compute_dtype: torch.dtype | None
) -> nn.Module:
    """Wrap every decoder layer and the root with FSDP1, full shard."""
    from torch.distributed.fsdp import CPUOffload, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FSDP1(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in _layers(model, config)}),
        mixed_precision=MixedPrecision(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        cpu_offload=CPUOffload(offload_params=config.cpu_offload),
        device_id=device,
        use_orig_params=True,
    )


def gradient_sync(model: nn.Module, strategy: Any, is_last: bool, every_time: bool) -> AbstractContextManager[Any]:
    """Return the context of a micro batch's backward pass: the last, or each (`every_time`), reduces over ranks."""
    from lightning.pytorch.strategies import DDPStrategy

    reduces = is_last or every_time
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduces)
        # keeps embedding and head gathered, as the forward pass left them, for the next micro batch
        model.set_reshard_after_backward(is_last, recurse=False)
    elif isinstance(model, FSDP1) and not reduces:
        return model.no_sync()
    elif isinstance(strategy, DDPStrategy) and not reduces:
        return strategy.block_backward_sync()
    return nullcontext()


def clip_gradients(model: nn.Module, max_norm: float, share: Share) -> Tensor:
    """Clip the gradients to `max_norm` over all ranks, and return the norm before, on the CPU. Collective."""
    if isinstance(model, FSDP1):
        return model.clip_grad_norm_(max_norm).cpu()
    parameters = [*model.parameters()]
    if share.within is not None:
        average_copies(parameters, share.within)
    return clip_grad_norm(parameters, max_norm).detach().cpu()


@torch.no_grad()
def average_copies(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average the gradients of the layers' weights that are replicated in a tensor-parallel group. Collective.

    They are equal but for rounding, whose order on a GPU is not fixed. AdamW would turn the differences into steps,
    and the copies would drift apart.
    """
    sharded = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    grads = [grad.to_local() for grad in sharded if grad.device_mesh.mesh_dim_names == ("data_parallel",)]
    mean = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(mean, group=group)
    mean /= group.size()
    for grad, of_one in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(of_one.view_as(grad))


def clip_grad_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most `max_norm` over all ranks, and return the norm before. Collective.

    Under tensor parallelism parameters lie on meshes of several shapes, which torch does not combine into one norm.
    """
    on_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            on_mesh[parameter.device_mesh].append(parameter)
    if len(on_mesh) < 2:
        return full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))
    grads = [[p.grad for p in group if p.grad is not None] for group in on_mesh.values()]
    norm = torch.stack([full_tensor(nn.utils.get_total_norm(of_group)) for of_group in grads]).norm()
    for group in on_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a shard; any other tensor itself. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unwrap(model: nn.Module) -> LanguageModel:
    """Return the language model inside FSDP1's wrapper, or `model` itself."""
    inner = model.module if isinstance(model, FSDP1) else model
    assert isinstance(inner, LanguageModel)
    return inner


def gathered(model: nn.Module, writeback: bool) -> AbstractContextManager[Any]:
    """Return a context in which FSDP1's parameters are full; nothing for other models. Collective under FSDP1.

    FSDP1's root keeps a gathered copy, which would hide an update of its shards: `writeback` keeps changes.
    """
    return FSDP1.summon_full_params(model, writeback=writeback) if isinstance(model, FSDP1) else nullcontext()


def reshard(model: nn.Module) -> None:
    """Drop gathered FSDP2 copies, which may be stale or in the dtype of the computation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def can_change_device(model: nn.Module) -> bool:
    """Return whether `model.to(device)` moves the weights between steps; FSDP1's flat parameters stay in place."""
    return not isinstance(model, FSDP1)
