"""Collation of token sequences into padded rows or one packed row, and their division into micro batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdzero.types import Example, TokenIds


@dataclass
class SequenceBatch:
    """Right-padded rows, or all sequences packed into one row.

    Causal attention never looks right, so padding needs no attention mask. Packed, B is 1 and positions restart at 0
    with every sequence, by which attention separates them.

    Attributes:
        input_ids: [B, T].
        predicts: bool [B, T], true at the positions whose next token is a target.
        targets: [N], these next tokens, sequence by sequence.
        position_ids: [1, T] if packed, else None.
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
    """Collate sequences context | target, padded to the longest or packed. Every context needs at least one token."""
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
    """Divide examples, longest first, into micro batches of at most `max_tokens`, but at least one example.

    Padded, the size is rows x longest, and examples of similar length share a micro batch. Packed, it is the sum of
    the examples' lengths, and an example joins the first micro batch with room for it.
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


def filler_example(pad_id: int) -> Example:
    """Make a short example of weight 0, for ranks that have run out of examples in a collective forward pass."""
    pad = (pad_id,)
    return Example("", pad, pad, teacher_context=pad, weight=0.0, logprobs=(0.0,))
