"""A model over several processes: FSDP2 and FSDP1, decoder layer by decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

from sdzero.models import LanguageModel, ModelConfig


def _layers(model: LanguageModel, config: ModelConfig) -> list[nn.Module]:
    names = set(config.layer_classes or model.hf._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise ValueError(f"model.layer_classes: no layer of {sorted(names)} in {type(model.hf).__name__}")
    return layers


def shard_fsdp2(model: LanguageModel, config: ModelConfig, mesh: Any, compute_dtype: torch.dtype | None) -> nn.Module:
    """FSDP2: every decoder layer and the root. The root stays gathered after its forward pass, head included."""
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    }
    for layer in _layers(model, config):
        fully_shard(layer, **options)
    fully_shard(model, reshard_after_forward=False, **options)  # in place
    return model


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
