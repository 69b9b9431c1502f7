"""A model's weights, whole, however it is sharded: handed out, averaged into another model, exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor

from sdzero.models.language_model import LanguageModel, weights_sha256
from sdzero.models.lora import ADAPTER, BASE, Adapter, adapters
from sdzero.prompts import PromptBuilder
from sdzero.utils.files import atomic_folder


def unwrap(model: nn.Module) -> LanguageModel:
    inner = model.module if isinstance(model, FSDP1) else model
    assert isinstance(inner, LanguageModel)
    return inner


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full detached tensor) of each weight once, tied ones under their first name.

    Adapters come merged into the weights beside them, in float32. Collective where the model is sharded: every rank
    must consume the whole iterator.
    """
    reshard(model)
    gathered = FSDP1.summon_full_params(model, writeback=False) if isinstance(model, FSDP1) else nullcontext()
    with gathered, torch.no_grad():
        hf = unwrap(model).hf
        beside = {_plain(name): adapter for name, adapter in adapters(hf).items()}
        for name, parameter in hf.named_parameters():
            name, tensor = _plain(name), _whole(parameter)
            if BASE in name and (adapter := beside.get(name.removesuffix(".base_layer.weight"))):
                tensor = Adapter(_whole(adapter.down), _whole(adapter.up), adapter.scale).merge(tensor)
            if ADAPTER not in name:
                yield name.replace(BASE, "."), tensor


def _plain(name: str) -> str:
    """Without what wrapping puts into it."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def lerp_weights(target: nn.Module, source: nn.Module, weight: float) -> None:
    """target += weight * (source - target), shard by shard; 1.0 copies exactly. Collective under FSDP1."""
    reshard(target)
    reshard(source)
    with ExitStack() as gathered, torch.no_grad():
        if isinstance(target, FSDP1):  # its root keeps a gathered copy, which would hide the update
            gathered.enter_context(FSDP1.summon_full_params(target, writeback=True))
            gathered.enter_context(FSDP1.summon_full_params(source, writeback=False))
        for into, of in zip(target.parameters(), source.parameters(), strict=True):
            value = of.detach().to(into.dtype)
            into.copy_(value) if weight == 1.0 else into.lerp_(value, weight)


def reshard(model: nn.Module) -> None:
    """Drops gathered FSDP2 copies: they may be stale, or in the computation's dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def export(model: nn.Module, builder: PromptBuilder, folder: Path, is_writer: bool, manifest: dict[str, Any]) -> None:
    """Writes a Hugging Face folder that vLLM and transformers load, whole or not at all. Collective.

    `manifest` goes into its sdzero.json, with the weights' hash added.
    """
    weights = {name: tensor.cpu().clone() for name, tensor in full_weights(model) if is_writer}
    if not is_writer:
        return
    manifest = {**manifest, "weights_sha256": weights_sha256(weights.items())}
    with atomic_folder(folder) as partial:
        unwrap(model).hf.save_pretrained(partial, state_dict=weights)  # empties the dict
        builder.tokenizer.save_pretrained(partial)
        (partial / "sdzero.json").write_text(json.dumps(manifest, indent=2) + "\n")
