"""Phase 1, self-revision training (section 2.1): two cross-entropy terms from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdzero.losses import cross_entropy_head
from sdzero.methods.base import Method
from sdzero.methods.batching import collate
from sdzero.types import Example, LossOutput, TraceBatch


class SRT(Method):
    """Cross-entropy on self-revision traces, equation 3; on traces without y_init it is SFT or RFT.

    L_revision and L_generation are sums over the same token sequence, so token weights give both from
    one pass: 1/N_gen on y_init and P_r, 1/N_gen + 1/N_rev on y_revised.

    Args:
        revision_weight: factor of L_revision (equation 1).
        generation_weight: factor of L_generation (equation 2).
        kwargs: as in Method.
    """

    def __init__(self, *args: Any, revision_weight: float = 1.0, generation_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if revision_weight < 0 or generation_weight < 0 or not revision_weight + generation_weight:
            raise ValueError("revision_weight and generation_weight must be at least 0, and one of them above")
        self.revision_weight = revision_weight
        self.generation_weight = generation_weight

    def examples(self, batch: TraceBatch) -> list[Example]:
        if not self.generation_weight and all(trace.reward is None for trace in batch.traces):
            return []  # demonstrations have the generation term only: with that off they teach nothing
        examples = []
        for trace in batch.traces:
            initial = trace.init_ids + trace.bridge_ids
            target = initial + trace.revised_ids
            # without y_init there is nothing to revise: the trace has no revision tokens
            num_init = len(initial) if trace.reward is not None else len(target)
            examples.append(Example(trace.question.id, trace.prompt_ids, target, num_init=num_init))
        return examples

    def counts(self, examples: Sequence[Example]) -> list[int]:
        """N_gen, N_rev, and the traces of each term."""
        revised = [len(e.target) - e.num_init for e in examples]
        return [sum(len(e.target) for e in examples), sum(revised), len(examples), sum(n > 0 for n in revised)]

    def num_trained(self, examples: Sequence[Example]) -> int:
        return sum(self.counts(examples)[:2])

    def loss(self, examples: Sequence[Example], counts: Sequence[float], prepared: None = None) -> LossOutput:
        contexts, targets = [e.context for e in examples], [e.target for e in examples]
        batch = collate(contexts, targets, self.builder.pad_id, self.packed).to(self.device)
        num_generated, num_revised = counts[:2] if self.reduction == "token_mean" else counts[2:]
        generation = torch.cat([torch.full((len(e.target),), e.weight) for e in examples]).to(self.device)
        is_revised = torch.cat([torch.arange(len(e.target)) >= e.num_init for e in examples]).to(self.device)
        generation = generation / num_generated
        revision = generation * is_revised * (num_generated / max(num_revised, 1))
        weights = self.generation_weight * generation + self.revision_weight * revision

        def head(hidden: Tensor, weight: Tensor) -> LossOutput:
            return cross_entropy_head(hidden, weight, batch.targets, weights, 1.0)

        output = self.student(batch.input_ids, batch.predicts, head, batch.position_ids)
        surprisal = -output.metrics["logprobs"]
        metrics = {"loss_generation": surprisal @ generation, "loss_revision": surprisal @ revision}
        return LossOutput(output.loss, metrics)
