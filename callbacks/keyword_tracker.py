"""Frequency of self-revision keywords in responses (figure 6)."""

from __future__ import annotations

from sdzero.callbacks.base import ResponseTracker, drop_nan
from sdzero.evaluation.keywords import count_keywords
from sdzero.evaluation.metrics import KeywordRate, Ratio, Scalars
from sdzero.methods import Policy
from sdzero.types import EvalBatch, RolloutBatch


class KeywordTracker(ResponseTracker):
    """Logs the paper's self-revision keywords (appendix E.1) per response and per 1,000 tokens, the share of responses
    with any (`keywords_share`), and the keywords per response by reward (`keywords_r0`, `keywords_r1`)."""

    def __init__(self) -> None:
        super().__init__(rate=KeywordRate(), share=Ratio(), r0=Ratio(), r1=Ratio())

    def update(self, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        texts = [s.rollout.text for s in batch.scored]
        self.metrics["rate"].update(texts, [len(s.rollout.token_ids) for s in batch.scored])
        counts = [(s.verdict.reward, count_keywords(text)) for s, text in zip(batch.scored, texts, strict=True)]
        self.metrics["share"].update(sum(n > 0 for _, n in counts), len(counts))
        for reward in (0, 1):
            of_reward = [n for r, n in counts if r == reward]
            self.metrics[f"r{reward}"].update(sum(of_reward), len(of_reward))

    def compute(self, evaluates: bool) -> Scalars:
        rates = self.metrics["rate"].compute()  # evaluations log these themselves
        values = {f"keywords_{name}": self.metrics[name].compute() for name in ("share", "r0", "r1")}
        return drop_nan(values) if evaluates else {**rates, **values}
