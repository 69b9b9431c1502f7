"""Phase 1, self-revision training (section 2.1): two cross-entropy terms from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdzero.methods.sft import SFT
from sdzero.types import Example, LossOutput, TraceBatch


class SRT(SFT):
    """L_revision + L_generation on self-revision traces, equation 3. A trace without y_init has the generation term
    only.

    Both terms are sums over the same token sequence, so token weights give both from one pass: 1/N_gen on y_init and
    P_r, 1/N_gen + 1/N_rev on y_revised.

    Args:
        revision_weight: factor of L_revision (equation 1).
        generation_weight: factor of L_generation (equation 2).
        kwargs: as in Method.
    """

    def __init__(self, *args: Any, revision_weight: float = 1.0, generation_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if revision_weight < 0 or generation_weight < 0 or not revision_weight + generation_weight:
            raise ValueError("revision_weight and generation_weight must be non-negative and not both zero")
        self.revision_weight = revision_weight
        self.generation_weight = generation_weight

    def examples(self, batch: TraceBatch) -> list[Example]:
        if not self.generation_weight and all(trace.reward is None for trace in batch.traces):
            return []  # no trace has a term with a weight: the batch counts as skipped
        return super().examples(batch)

    def loss_denominators(self, examples: Sequence[Example]) -> list[int]:
        """Count N_gen, the traces with that term, N_rev, and the traces with that term."""
        revised = [len(e.target) - e.num_init for e in examples]
        return [*super().loss_denominators(examples), sum(revised), sum(n > 0 for n in revised)]

    def num_trained(self, examples: Sequence[Example]) -> int:
        num_generation, _, num_revision, _ = self.loss_denominators(examples)
        return num_generation + num_revision

    def loss(self, examples: Sequence[Example], denominators: Sequence[float], precomputed: None = None) -> LossOutput:
        weights, num_generation = self.token_weights(examples, denominators)
        num_revision = denominators[2 if self.reduction == "token_mean" else 3]
        is_revision = torch.cat([self._is_revision(e) for e in examples]).to(self.device)
        generation = weights / num_generation
        revision = generation * is_revision * (num_generation / max(num_revision, 1))
        weights = self.generation_weight * generation + self.revision_weight * revision
        output = self.cross_entropy(examples, weights)
        surprisal = -output.metrics["logprobs"]
        metrics = {"loss_generation": surprisal @ generation, "loss_revision": surprisal @ revision}
        return LossOutput(output.loss, metrics)

    def _is_revision(self, example: Example) -> torch.Tensor:
        """Return 1 at the tokens of y_revised; for a mean over them, their weight relative to that over all tokens."""
        num, num_init = len(example.target), example.num_init
        is_revision = torch.arange(num) >= num_init
        return is_revision * (num / max(num - num_init, 1)) if self.reduction == "sequence_mean" else is_revision
