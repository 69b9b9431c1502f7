"""Length of responses, and of the part before </think> (figure 6, appendix F)."""

from __future__ import annotations

from sdzero.callbacks.base import ResponseTracker, drop_nan
from sdzero.evaluation.metrics import LengthDistribution, Ratio, Scalars
from sdzero.methods import Policy
from sdzero.types import EvalBatch, RolloutBatch

END_OF_THOUGHT = "</think>"


class LengthTracker(ResponseTracker):
    """Logs the response length by reward (`length_r0`, `length_r1`), its median, ninth decile and maximum
    (`length_p50`, `length_p90`, `length_max`) and, if the tokenizer has `</think>`, the mean number of tokens up to it
    (`length_think`)."""

    def __init__(self) -> None:
        super().__init__(length=LengthDistribution(), think=Ratio())
        self.thinks = False

    def update(self, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        responses = [s.rollout.token_ids for s in batch.scored]
        self.metrics["length"].update([len(ids) for ids in responses], [s.verdict.reward for s in batch.scored])
        end = pl_module.builder.tokenizer.get_vocab().get(END_OF_THOUGHT)
        self.thinks = end is not None
        thoughts = [ids.index(end) + 1 for ids in responses if end in ids]
        self.metrics["think"].update(sum(thoughts), len(responses))

    def compute(self, evaluates: bool) -> Scalars:
        values = self.metrics["length"].compute()
        if self.thinks:
            values["length_think"] = self.metrics["think"].compute()
        return drop_nan(values) if evaluates else values
