"""Token sequences as tensors, and which of them share a micro batch: padded rows, or one row that holds them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdzero.types import Example, TokenIds


@dataclass
class SequenceBatch:
    """Right-padded rows, or all sequences packed into one row.

    Causal attention never looks right, so padding needs no attention mask. Packed, B is 1 and positions start again at
    0 with every sequence, which is how attention tells them apart.

    input_ids: [B, T]; predicts: bool [B, T], the positions whose next token is a target; targets: [N], those next
    tokens sequence by sequence; position_ids: [1, T] where packed, else None.
    """

    input_ids: Tensor
    predicts: Tensor
    targets: Tensor
    position_ids: Tensor | None = None

    def to(self, device: torch.device) -> SequenceBatch:
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return SequenceBatch(self.input_ids.to(device), self.predicts.to(device), self.targets.to(device), positions)


def collate(
    contexts: Sequence[TokenIds], targets: Sequence[TokenIds], pad_id: int, packed: bool = False
) -> SequenceBatch:
    """Sequences context | target, padded to the longest or packed. Every context has at least one token."""
    assert len(contexts) == len(targets) and all(contexts)
    lengths = [len(c) + len(t) for c, t in zip(contexts, targets, strict=True)]
    width = sum(lengths) if packed else max(lengths)
    input_ids = torch.full((1 if packed else len(contexts), width), pad_id)
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)
    starts = [sum(lengths[:i]) if packed else i * width for i in range(len(lengths))]
    for start, length, context, target in zip(starts, lengths, contexts, targets, strict=True):
        end = start + length
        input_ids.view(-1)[start:end] = torch.tensor(context + target)
        predicts.view(-1)[start + len(context) - 1 : end - 1] = True
    flat = torch.tensor([token for target in targets for token in target], dtype=torch.long)
    positions = torch.cat([torch.arange(length) for length in lengths])[None] if packed else None
    return SequenceBatch(input_ids, predicts, flat, positions)


def micro_batches(examples: Sequence[Example], max_tokens: int, packed: bool = False) -> list[list[Example]]:
    """Longest first, each micro batch as many examples as fit into `max_tokens`, at least one.

    Padded, rows x longest count: neighbours in length share a micro batch. Packed, the examples' own tokens count, and
    an example goes into the first micro batch that has room for it.
    """
    batches: list[list[Example]] = []
    used: list[int] = []  # tokens of each batch
    for example in sorted(examples, key=lambda e: (-e.length, e.id)):
        candidates = range(len(batches)) if packed else range(len(batches))[-1:]
        for i in candidates:
            size = used[i] + (example.length if packed else batches[i][0].length)
            if size <= max_tokens:
                batches[i].append(example)
                used[i] = size
                break
        else:
            batches.append([example])
            used.append(example.length)
    return batches
