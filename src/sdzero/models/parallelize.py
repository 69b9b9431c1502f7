"""A model over several processes: tensor parallelism, FSDP2 and FSDP1, decoder layer by decoder layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
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

# The styles of transformers' own plans, by torch's. What a plan does not name is computed whole by every rank.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    # where a norm stands between them that needs all heads of a token
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    # a norm of single heads, [B, T, heads, head size]: each rank has its heads, so its gradients are summed
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}


def _layers(model: LanguageModel, config: ModelConfig) -> list[nn.Module]:
    names = set(config.layer_classes or model.hf._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise ValueError(f"student.layer_classes: no layer of {sorted(names)} in {type(model.hf).__name__}")
    return layers


def check_tensor_parallel(hf_config: Any, size: int) -> None:
    """Raises: ValueError if a model of that Hugging Face config cannot be computed by `size` ranks together."""
    if size == 1:
        return
    what = f"strategy.tensor_parallel_size={size}: {hf_config.model_type}"
    plan = _plan(hf_config)
    if not plan:
        raise ValueError(f"{what} has no plan for tensor parallelism in transformers: set it to 1")
    if unknown := sorted(set(plan.values()) - STYLES.keys()):
        raise ValueError(f"{what} wants {', '.join(unknown)}, which is not supported: set it to 1")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (count := getattr(hf_config, name, None) or 0) % size:
            raise ValueError(f"{what} has {name}={count}, which it does not divide: choose another size")


def _plan(hf_config: Any) -> dict[str, str]:
    """Module of the decoder -> style. Embedding, final norm and head stay whole: the loss heads take the whole head."""
    plan = getattr(hf_config, "base_model_tp_plan", None) or {}
    return {name: style for name, style in plan.items() if name.startswith("layers.")}


def parallelize(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Cuts the layers' weights over the ranks of `mesh`, by transformers' own plan; in place.

    Raises:
        ValueError: as `check_tensor_parallel`.
    """
    check_tensor_parallel(model.hf.config, mesh.size())
    plan = {name: STYLES[style]() for name, style in _plan(model.hf.config).items()}
    parallelize_module(model.hf.get_decoder(), mesh, plan, src_data_rank=None)  # all have read the same: send nothing


def shard_fsdp2(
    model: LanguageModel, config: ModelConfig, mesh: DeviceMesh, compute_dtype: torch.dtype | None
) -> nn.Module:
    """FSDP2: every decoder layer and the root. The root stays gathered after its forward pass, head included.

    `mesh` is two-dimensional, data_parallel x tensor_parallel. Layers are cut by tensor parallelism first, and sharded
    over the ranks that have the same cut; the root, which is not cut, over all ranks.
    """
    layer_mesh = root_mesh = mesh["data_parallel"]
    if mesh["tensor_parallel"].size() > 1:
        parallelize(model, mesh["tensor_parallel"])
        root_mesh = mesh._flatten("all_ranks")
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(mesh.device_type != "cpu") if config.cpu_offload else OffloadPolicy(),
    }
    for layer in _layers(model, config):
        fully_shard(layer, mesh=layer_mesh, **options)
    fully_shard(model, mesh=root_mesh, reshard_after_forward=False, **options)  # in place
    return model


@torch.no_grad()
def average_copies(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Averages the gradients of the layers' weights that each rank of a tensor-parallel group holds whole. Collective
    over the group.

    They are the same but for rounding, which on a GPU has no fixed order. AdamW would make steps of it, and the copies
    would drift apart.
    """
    sharded = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    grads = [grad.to_local() for grad in sharded if grad.device_mesh.mesh_dim_names == ("data_parallel",)]
    mean = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(mean, group=group)
    mean /= group.size()
    for grad, of_one in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(of_one.view_as(grad))


def clip_grad_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients so that their norm over all ranks is at most `max_norm`, and returns what it was. Collective
    where they are sharded.

    Under tensor parallelism parameters lie on meshes of several shapes, which torch does not put into one sum.
    """
    on_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            on_mesh[parameter.device_mesh].append(parameter)
    if len(on_mesh) < 2:
        return _whole(nn.utils.clip_grad_norm_(parameters, max_norm))
    grads = [[p.grad for p in group if p.grad is not None] for group in on_mesh.values()]
    norm = torch.stack([_whole(nn.utils.get_total_norm(of_group)) for of_group in grads]).norm()
    for group in on_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_fsdp1(
    model: LanguageModel, config: ModelConfig, device: torch.device, compute_dtype: torch.dtype | None
) -> nn.Module:
    """FSDP1, full shard: every decoder layer and the root."""
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
