"""Length of responses, and of the part before </think> (figure 6, appendix F)."""

from __future__ import annotations

from sdzero.callbacks.base import ResponseTracker
from sdzero.evaluation.metrics import LengthDistribution, Ratios, Scalars
from sdzero.methods import Policy
from sdzero.types import EvalBatch, RolloutBatch

END_OF_THOUGHT = "</think>"


class LengthTracker(ResponseTracker):
    """Logs the response length by reward (`length_r0`, `length_r1`), its median, ninth decile and maximum
    (`length_p50`, `length_p90`, `length_max`) and, if the tokenizer has `</think>`, the mean number of tokens up to it
    (`length_think`)."""

    def __init__(self) -> None:
        self.lengths, self.thoughts = LengthDistribution(), Ratios("length_think")
        self.thinks = False
        super().__init__(self.lengths, self.thoughts)

    def update(self, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        responses = [s.rollout.token_ids for s in batch.scored]
        self.lengths.update([len(ids) for ids in responses], [s.verdict.reward for s in batch.scored])
        end = pl_module.builder.tokenizer.get_vocab().get(END_OF_THOUGHT)
        self.thinks = end is not None
        self.thoughts.update(length_think=(sum(ids.index(end) + 1 for ids in responses if end in ids), len(responses)))

    def compute(self, evaluates: bool) -> Scalars:
        values = super().compute(evaluates)
        return values if self.thinks else {name: v for name, v in values.items() if name != "length_think"}
