"""Low-rank adapters beside frozen weights (LoRA, arXiv:2106.09685), put there by peft.

A linear layer's output W x becomes W x + alpha / rank * B A x. Only A [rank, in] and B [out, rank] train. B starts as
zeros, so the model starts as its base, and with the adapters switched off it stays it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

BASE, ADAPTER = ".base_layer.", ".lora_"
"""Parts of the parameter names that peft gives to an adapted layer's own weights and to its adapters."""


@dataclass
class Lora:
    """Adapters beside a decoder's linear layers; embedding and head have none. There is no dropout, so that the trained
    weights are those that have sampled.

    Args:
        rank: rank of each adapter.
        alpha: an adapter's output is scaled by alpha / rank.
        target_modules: `all-linear`, or the last names of the linear layers that get adapters, e.g. `[q_proj, v_proj]`.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"student.lora: rank and alpha must be above 0, got {self.rank} and {self.alpha}")


def check_installed() -> None:
    """Raise ModuleNotFoundError if peft is missing; names the extra that installs it."""
    if find_spec("peft") is None:
        raise ModuleNotFoundError('student.lora needs peft: pip install "sdzero[lora]"', name="peft")


def target_layers(hf: Any, lora: Lora) -> dict[str, nn.Linear]:
    """Return the linear layers of a Hugging Face model that get an adapter, by name; weights may be on `meta`.

    Raises: ValueError for a target that is not a linear layer of the model.
    """
    head = hf.get_output_embeddings()
    linear = {name: m for name, m in hf.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if lora.target_modules == "all-linear":
        return linear
    known = sorted({name.rpartition(".")[2] for name in linear})
    unknown = sorted({*lora.target_modules} - {*known})
    if unknown or not lora.target_modules:
        wrong = f"no linear layer is called {', '.join(unknown)}" if unknown else "it is empty"
        raise ValueError(f"student.lora.target_modules: {wrong}; the decoder has {', '.join(known)}")
    return {name: layer for name, layer in linear.items() if name.rpartition(".")[2] in lora.target_modules}


def num_adapter_parameters(hf: Any, lora: Lora) -> int:
    """Return the number of trained parameters of a model that has no adapters yet."""
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in target_layers(hf, lora).values())


def add_adapters(hf: Any, lora: Lora) -> None:
    """Freeze a Hugging Face model and add float32 adapters, initialised from torch's random state.

    Raises: ValueError for a target that is not a linear layer of the model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = [*target_layers(hf, lora)]
    hf.requires_grad_(False)
    alpha: Any = lora.alpha  # an integer in peft's eyes, and only ever divided by the rank
    inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets), hf)
    for name, parameter in hf.named_parameters():
        if ADAPTER in name:
            parameter.data = parameter.data.float()  # peft makes them of the base's dtype
    adapted = {name for name, _ in _adapted_layers(hf)}
    assert adapted == {*targets}, adapted ^ {*targets}


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


@dataclass(frozen=True)
class Adapter:
    """Adapter of one layer: `down` is A [rank, in], `up` is B [out, rank]."""

    down: Tensor
    up: Tensor
    scale: float

    def merge(self, weight: Tensor) -> Tensor:
        """Return the layer's weight [out, in] plus the adapter's product, in float32, which keeps small changes."""
        return weight.float() + (self.up @ self.down) * self.scale


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters by name of their layer; of a sharded model, their shards."""
    return {
        name: Adapter(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        for name, layer in _adapted_layers(model)
    }


class AdaptersOff:
    """A model before training: the same weights, with its adapters switched off during a call.

    Not a module, so that a checkpoint holds the model once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        """Run a forward pass in evaluation mode."""
        layers, was_training = [layer for _, layer in _adapted_layers(self.model)], self.model.training
        self.model.eval()
        try:
            for layer in layers:  # peft's own switch changes requires_grad too, which sharding does not survive
                layer._disable_adapters = True
            return self.model(*args)
        finally:
            for layer in layers:
                layer._disable_adapters = False
            self.model.train(was_training)
