"""Random choice of a collection's traces."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

TraceKey = tuple[int, int, int, int]
"""Chunk, first attempt in it, revision of that, and the first attempt's reward."""


def choose_traces(
    kept: Sequence[TraceKey], num_traces: int | None, correct_share: float | None, rng: random.Random
) -> set[TraceKey]:
    """Choose traces at random.

    Args:
        kept: traces to choose from.
        num_traces: number of traces; None: all.
        correct_share: fraction of them with a correct first attempt; None: left to chance.
        rng: source of the choice.
    """
    shuffled = sorted(kept)
    rng.shuffle(shuffled)
    num = len(shuffled) if num_traces is None else num_traces
    if correct_share is None:
        return set(shuffled[:num])
    by_reward = {r: [k for k in shuffled if k[3] == r] for r in (0, 1)}
    shares = {1: correct_share, 0: 1 - correct_share}
    # the scarcer branch limits the number of traces with these shares
    num = int(min([num, *(len(by_reward[r]) / share for r, share in shares.items() if share)]))
    num_correct = round(num * correct_share)
    return {*by_reward[1][:num_correct], *by_reward[0][: num - num_correct]}


def choose_answers(
    kept: Sequence[TraceKey], num_traces: int | None, num_initial: int, rng: random.Random
) -> set[TraceKey]:
    """Choose answers at random, of each question one before any second (RFT).

    Args:
        kept: answers to choose from, first attempts all.
        num_traces: number of answers; None: all.
        num_initial: first attempts per question.
        rng: source of the choice.
    """
    shuffled = sorted(kept)
    rng.shuffle(shuffled)
    turns: Counter[tuple[int, int]] = Counter()
    in_turns: list[tuple[int, TraceKey]] = []
    for key in shuffled:
        question = (key[0], key[1] // num_initial)
        turns[question] += 1
        in_turns.append((turns[question], key))
    in_turns.sort(key=lambda pair: pair[0])
    return {key for _, key in in_turns[:num_traces]}
