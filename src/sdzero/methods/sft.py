"""Supervised fine-tuning: cross-entropy on the response of each trace (SFT, RFT)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sdzero.losses import cross_entropy_head
from sdzero.methods.base import Method
from sdzero.methods.batching import collate
from sdzero.types import Example, LossOutput, TraceBatch


class SFT(Method):
    """Cross-entropy on everything after a trace's prompt: SFT on demonstrations, RFT on the model's own verified
    responses. On self-revision traces it is L_generation, equation 2."""

    def examples(self, batch: TraceBatch) -> list[Example]:
        examples = []
        for trace in batch.traces:
            initial = trace.init_ids + trace.bridge_ids
            target = initial + trace.revised_ids
            # without y_init there is nothing to revise: no token of the trace is a revision
            num_init = len(target) if trace.reward is None else len(initial)
            examples.append(Example(trace.question.id, trace.prompt_ids, target, num_init=num_init))
        return examples

    def loss_denominators(self, examples: Sequence[Example]) -> list[int]:
        """Count target tokens, and traces."""
        return [sum(len(e.target) for e in examples), len(examples)]

    def loss(self, examples: Sequence[Example], denominators: Sequence[float], precomputed: None = None) -> LossOutput:
        weights, num = self.token_weights(examples, denominators)
        return LossOutput(self.cross_entropy(examples, weights / num).loss)

    def cross_entropy(self, examples: Sequence[Example], weights: Tensor) -> LossOutput:
        """Sum `weights` [N] times the negative log-probabilities of the target tokens; metrics: logprobs [N]."""
        contexts, targets = [e.context for e in examples], [e.target for e in examples]
        batch = collate(contexts, targets, self.builder.pad_id, self.packed).to(self.device)

        def head(hidden: Tensor, weight: Tensor) -> LossOutput:
            return cross_entropy_head(hidden, weight, batch.targets, weights, 1.0)

        return self.student(batch.input_ids, batch.predicts, head, batch.position_ids)
