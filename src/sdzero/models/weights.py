"""Full weights of a model, however it is sharded: iterated, hashed, interpolated."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from sdzero.models.lora import ADAPTER, BASE, Adapter, adapters
from sdzero.models.parallelize import full_tensor, gathered, reshard, unwrap


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full detached tensor) of each weight once, tied ones under their first name.

    Adapters are merged into the weights beside them, in float32. Collective where the model is sharded: every rank
    must consume the whole iterator.
    """
    reshard(model)
    with gathered(model, writeback=False), torch.no_grad():
        hf = unwrap(model).hf
        by_layer = {_plain(name): adapter for name, adapter in adapters(hf).items()}
        for name, parameter in hf.named_parameters():
            name, tensor = _plain(name), full_tensor(parameter.detach())
            if BASE in name and (adapter := by_layer.get(name.removesuffix(".base_layer.weight"))):
                down, up = full_tensor(adapter.down.detach()), full_tensor(adapter.up.detach())
                tensor = Adapter(down, up, adapter.scale).merge(tensor)
            if ADAPTER not in name:
                yield name.replace(BASE, "."), tensor


def _plain(name: str) -> str:
    """Return the parameter's name without the parts added by wrapping."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def lerp_weights(target: nn.Module, source: nn.Module, weight: float) -> None:
    """Compute target += weight * (source - target), shard by shard; 1.0 copies exactly. Collective under FSDP1."""
    reshard(target)
    reshard(source)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(gathered(target, writeback=True))
        stack.enter_context(gathered(source, writeback=False))
        for into, of in zip(target.parameters(), source.parameters(), strict=True):
            value = of.detach().to(into.dtype)
            into.copy_(value) if weight == 1.0 else into.lerp_(value, weight)


def weights_sha256(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Compute the sha256 over name, dtype, shape and bytes of every weight, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights, key=lambda item: item[0]):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """Compute `weights_sha256` of an exported model folder."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    return weights_sha256(item for file in files for item in load_file(file).items())
