"""Share of an attempt that its revision copies, and rate of control phrases in first attempts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from sdzero.callbacks.base import ResponseTracker, drop_nan
from sdzero.evaluation.metrics import Ratio, Scalars
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
        super().__init__(**{name: Ratio() for name in (*names, *(f"revise_copy_rate{r}" for r in ("", "_r0", "_r1")))})

    def update(self, pl_module: Policy, batch: RolloutBatch | EvalBatch) -> None:
        builder = pl_module.builder
        phrases = [builder.control_phrases[r] for r in (0, 1)]
        found = [[phrase in s.rollout.text for phrase in phrases] for s in batch.scored]
        for name, leaks in (("", map(any, found)), ("_p0", (f[0] for f in found)), ("_p1", (f[1] for f in found))):
            self.metrics[f"phrase_leak{name}"].update(sum(leaks), len(found))
        own = [
            copied_within(builder, s.rollout.text) for s, flags in zip(batch.scored, found, strict=True) if any(flags)
        ]
        self._add("copy_rate", own)
        requested = [
            (first.verdict.reward, (num_copied(revision, builder.body(first.rollout.token_ids)), len(revision)))
            for first, second in (batch.revised if isinstance(batch, EvalBatch) else ())
            if (revision := builder.body(second.rollout.token_ids))
        ]
        self._add("revise_copy_rate", [counts for _, counts in requested])
        for r in (0, 1):
            self._add(f"revise_copy_rate_r{r}", [counts for reward, counts in requested if reward == r])

    def _add(self, name: str, counts: list[tuple[int, int]]) -> None:
        self.metrics[name].update(sum(copied for copied, _ in counts), sum(num for _, num in counts))

    def compute(self, evaluates: bool) -> Scalars:
        values = {name: m.compute() for name, m in self.metrics.items() if evaluates or "revise" not in name}
        return drop_nan(values) if evaluates else values
