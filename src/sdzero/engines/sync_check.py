"""Verification of a weight sync: every weight arrives once, and some tensors are compared bit for bit.

A missed sync at a learning rate of 5e-6 hides in bfloat16's noise; an exact checksum detects it. The compared tensors
are those that the engine keeps under their own name and shape: all in `transformers`; in vLLM, which fuses and packs,
the embeddings, head, norms and biases, and on a GPU the projections back into the residual stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdzero.engines.base import EngineError

_CPU_CHUNK, _GPU_CHUNK = 2**18, 2**24  # elements: fits the CPU cache; keeps a GPU busy
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> int:
    """Compute an exact checksum of a tensor's bits and their positions, on the tensor's device.

    The sum of bits[i] * (2i + 1) modulo 2**64 detects any single change and any swap of unequal elements.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten()
    chunk = min(bits.numel(), _CPU_CHUNK if bits.device.type == "cpu" else _GPU_CHUNK)
    odd = torch.arange(1, 2 * chunk, 2, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), max(chunk, 1)):
        part = bits[start : start + chunk].long()
        total += (part * odd[: part.numel()]).sum() + 2 * start * part.sum()
    return int(total) % 2**64


@dataclass(frozen=True)
class WeightLayout:
    """Names and shapes of a model's weights. Each of `required` must arrive; the others are second names of tied
    weights, which may arrive too."""

    shapes: Mapping[str, torch.Size]
    required: frozenset[str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> WeightLayout:
        first: dict[int, str] = {}
        weights = model.state_dict(keep_vars=True)  # tied weights are one object under several names
        for name, tensor in weights.items():
            first.setdefault(id(tensor), name)
        return cls({name: tensor.shape for name, tensor in weights.items()}, frozenset(first.values()))

    @classmethod
    def of_pretrained(cls, path: str) -> WeightLayout:
        """Read the layout from the config of a model folder or hub id."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            return cls.of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)))


class SyncCheck:
    """Records the weights sent to an engine, then compares the tensors that the engine holds.

    Args:
        layout: weights that must arrive.
        held: the engine's own tensors before the sync; their shapes and dtypes decide which can be compared.
        dtype: dtype of the engine's weights.
    """

    def __init__(self, layout: WeightLayout, held: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._layout, self._dtype = layout, dtype
        self._held = {name: (tensor.shape, tensor.dtype) for name, tensor in held.items()}
        self._sent: dict[str, int] = {}
        self._compared: dict[str, tuple[int, int]] = {}  # name -> rows, fingerprint in the dtype held
        self._faults: list[str] = []

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass the weights on, detached, without the faulty ones.

        Faults are raised by `finish`: an engine may not survive an exception during a reload, and other ranks wait for
        this one to consume all weights.
        """
        for name, tensor in weights:
            fault = self._fault(name, tensor)
            if fault:
                self._faults.append(fault)
                continue
            tensor = tensor.detach()
            self._sent[name] = sent = fingerprint(tensor.to(self._dtype))
            if self._is_comparable(name, tensor):
                dtype = self._held[name][1]
                as_held = sent if dtype == self._dtype else fingerprint(tensor.to(dtype))
                self._compared[name] = tensor.shape[0], as_held
            yield name, tensor
        self._faults += [f"{name!r} was not sent" for name in sorted(self._layout.required - self._sent.keys())]

    def _fault(self, name: str, tensor: Tensor) -> str | None:
        shape = self._layout.shapes.get(name)
        if shape is None:
            return f"{name!r} is not a weight of the engine's model"
        if name in self._sent:
            return f"{name!r} was sent twice"
        if shape != tensor.shape:
            return f"{name!r} was sent with shape {tuple(tensor.shape)}, but the engine's model has {tuple(shape)}"
        return None

    def _is_comparable(self, name: str, tensor: Tensor) -> bool:
        if name not in self._held:
            return False
        shape, dtype = self._held[name]
        if shape == tensor.shape:
            return dtype.is_floating_point and tensor.dim() > 0
        is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))  # engines pad it with more rows
        return is_vocabulary and len(shape) == 2 and shape[0] >= tensor.shape[0] and shape[1] == tensor.shape[1]

    def finish(self, held: Mapping[str, Tensor]) -> str:
        """Verify the engine's tensors after the sync; return the checksum of the weights sent.

        Raises:
            EngineError: a faulty weight was sent, or a compared tensor of the engine differs from the one sent.
        """
        wrong = [name for name, (rows, sent) in self._compared.items() if fingerprint(held[name][:rows]) != sent]
        self._faults += [f"{name!r} of the engine differs from what was sent" for name in wrong]
        if not self._compared:
            self._faults.append("the engine holds no tensor in a form that can be compared with the weights sent")
        return self.checksum()

    def checksum(self) -> str:
        """Return the checksum of the weights sent.

        Raises:
            EngineError: a faulty weight was sent.
        """
        if self._faults:
            raise EngineError(
                f"weight sync: {self._faults[0]} ({len(self._faults)} such faults, {len(self._compared)} tensors "
                "compared): the engine's weights are stale or broken"
            )
        listing = "\n".join(f"{name} {value:016x}" for name, value in sorted(self._sent.items()))
        return hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()
