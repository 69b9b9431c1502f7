"""Frequency of self-revision keywords in responses (figure 6)."""

from __future__ import annotations

from sdzero.callbacks.base import ResponseTracker
from sdzero.evaluation.keywords import count_keywords
from sdzero.evaluation.metrics import Ratios, Scalars
from sdzero.methods import Policy
from sdzero.types import EvalBatch, RolloutBatch

RATES = ("keywords_per_response", "keywords_per_1k_tokens")  # evaluations log these themselves


class KeywordTracker(ResponseTracker):
    """Logs the paper's self-revision keywords (appendix E.1) per response and per 1,000 tokens, the share of responses
    with any (`keywords_share`), and the keywords per response by reward (`keywords_r0`, `keywords_r1`)."""

    def __init__(self) -> None:
        self.ratios = Ratios(*RATES, "keywords_share", "keywords_r0", "keywords_r1")
        super().__init__(self.ratios)

    def update(self, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        counts = [(s.verdict.reward, count_keywords(s.rollout.text)) for s in batch.scored]
        total = sum(n for _, n in counts)
        self.ratios.update(
            keywords_per_response=(total, len(counts)),
            keywords_per_1k_tokens=(1000 * total, sum(len(s.rollout.token_ids) for s in batch.scored)),
            keywords_share=(sum(n > 0 for _, n in counts), len(counts)),
        )
        for reward in (0, 1):
            of_reward = [n for r, n in counts if r == reward]
            self.ratios.update(**{f"keywords_r{reward}": (sum(of_reward), len(of_reward))})

    def compute(self, evaluates: bool) -> Scalars:
        values = super().compute(evaluates)
        return {name: value for name, value in values.items() if not evaluates or name not in RATES}
