"""Share of an attempt that its revision copies, and rate of control phrases in first attempts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from sdzero.callbacks.base import ResponseTracker
from sdzero.evaluation.metrics import Ratios, Scalars
from sdzero.methods import Policy
from sdzero.prompts import PromptBuilder
from sdzero.types import EvalBatch, RolloutBatch

RUN = 4


def num_copied(revision: Sequence[int], attempt: Sequence[int], run: int = RUN) -> int:
    """Count the tokens of `revision` that lie in a run of at least `run` tokens that `attempt` contains too.

    A shorter revision counts as one run.
    """
    run = max(1, min(run, len(revision)))
    known = {tuple(attempt[i : i + run]) for i in range(len(attempt) - run + 1)}
    copied: set[int] = set()
    for i in range(len(revision) - run + 1):
        if tuple(revision[i : i + run]) in known:
            copied.update(range(i, i + run))
    return len(copied)


def copied_within(builder: PromptBuilder, text: str) -> tuple[int, int]:
    """Count (copied, all) tokens of the attempts after a control phrase in one response, each compared with the attempt
    before its phrase."""
    attempts = re.split("|".join(re.escape(builder.control_phrases[r]) for r in (0, 1)), text)
    ids = [builder.tokenizer.encode(attempt.strip(), add_special_tokens=False) for attempt in attempts]
    return sum(num_copied(after, before) for before, after in pairwise(ids)), sum(map(len, ids[1:]))


class CopyTracker(ResponseTracker):
    """Logs control phrases in first attempts, and the part of an attempt that the next one copies.

    `phrase_leak_p0`, `phrase_leak_p1` and `phrase_leak` (either) are the shares of responses with a phrase that was not
    requested. The copied part is the share of the later attempt's tokens in common runs of at least 4: `copy_rate` if
    the model wrote the phrase itself; in evaluations with data.evaluation.num_revised `revise_copy_rate` for requested
    revisions, also by the first reward with `_r0` and `_r1`.
    """

    def __init__(self) -> None:
        names = ("phrase_leak", "phrase_leak_p0", "phrase_leak_p1", "copy_rate")
        self.ratios = Ratios(*names, *(f"revise_copy_rate{reward}" for reward in ("", "_r0", "_r1")))
        super().__init__(self.ratios)

    def update(self, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        builder = pl_module.builder
        found = [[builder.control_phrases[r] in s.rollout.text for r in (0, 1)] for s in batch.scored]
        self.ratios.update(
            phrase_leak=(sum(map(any, found)), len(found)),
            phrase_leak_p0=(sum(p0 for p0, _ in found), len(found)),
            phrase_leak_p1=(sum(p1 for _, p1 in found), len(found)),
        )
        for scored, flags in zip(batch.scored, found, strict=True):
            if any(flags):
                self.ratios.update(copy_rate=copied_within(builder, scored.rollout.text))
        for first, second in batch.revised if isinstance(batch, EvalBatch) else ():
            if revision := builder.body(second.rollout.token_ids):
                counts = num_copied(revision, builder.body(first.rollout.token_ids)), len(revision)
                self.ratios.update(revise_copy_rate=counts, **{f"revise_copy_rate_r{first.verdict.reward}": counts})

    def compute(self, evaluates: bool) -> Scalars:
        values = super().compute(evaluates)
        return {name: value for name, value in values.items() if evaluates or "revise" not in name}
