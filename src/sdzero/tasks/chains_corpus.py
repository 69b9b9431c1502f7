"""Pre-training corpus of the tiny base model: noisy solutions of chains, with unverified second attempts.

No document contains a verified correction: an attempt after P_0 or P_1 is as noisy as the first, whatever the first
one's answer. The base model learns to write chains with errors, to copy, and the form of the control phrases, but not
which revisions are correct.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice, pairwise

from sdzero.prompts import ControlPhrases, PromptBuilder
from sdzero.tasks.base import TraceSource
from sdzero.tasks.chains import OPERATORS, Chains, Step, apply, working
from sdzero.tasks.splits import split_of
from sdzero.types import Question, Trace
from sdzero.utils.seeds import derive_seed

ERROR_RATES, ERROR_SHARES = (0.04, 0.25, 0.60), (0.75, 0.15, 0.10)
HABIT = 0.8  # share of a fact's errors that are the same wrong digit, so that greedy decoding fails too
MORE_ATTEMPTS = 0.18
PHRASES = ControlPhrases()
COPY = {0: 0.5, 1: 0.95}  # probability of repeating the previous attempt's step, after P_0 and after P_1


class NoisyFacts:
    """Error rate and habitual error of each of the 300 facts `value operator operand`."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(derive_seed(seed, "chains", "facts"))
        facts = [(value, op, operand) for value in range(10) for op in OPERATORS for operand in range(10)]
        rng.shuffle(facts)
        bounds = [round(len(facts) * sum(ERROR_SHARES[:i])) for i in range(len(ERROR_SHARES) + 1)]
        self.error_rate = {
            fact: rate
            for rate, (begin, end) in zip(ERROR_RATES, pairwise(bounds), strict=True)
            for fact in facts[begin:end]
        }
        self.habit = {fact: (apply(*fact) + rng.randint(1, 9)) % 10 for fact in facts}

    def write(self, fact: tuple[int, str, int], rng: random.Random) -> int:
        """Sample a result for a fact, correct or wrong."""
        if rng.random() >= self.error_rate[fact]:
            return apply(*fact)
        if rng.random() < HABIT:
            return self.habit[fact]
        return rng.choice([digit for digit in range(10) if digit not in (apply(*fact), self.habit[fact])])


def _attempt(
    facts: NoisyFacts, first: int, steps: list[Step], rng: random.Random, previous: list[int], copy: float
) -> list[int]:
    """Sample the results of one attempt. A step is copied from `previous` only if it starts from the same value."""
    results: list[int] = []
    for i, step in enumerate(steps):
        value = results[-1] if results else first
        same = bool(previous) and value == ([first, *previous][i])
        results.append(previous[i] if same and rng.random() < copy else facts.write((value, *step), rng))
    return results


def corpus(
    num_documents: int, seed: int, phrases: ControlPhrases = PHRASES, min_ops: int = 4, max_ops: int = 8
) -> Iterator[tuple[Question, str]]:
    """Yield pairs for `PromptBuilder.demonstration`: a question outside the eval split, and a document answering it.

    82% of the documents are one attempt; the others are 2 to 4 attempts joined by P_0 or P_1 at random.
    """
    facts, rng = NoisyFacts(seed), random.Random(derive_seed(seed, "chains", "documents"))
    asked = (item for item in Chains(seed, min_ops, max_ops).stream("corpus") if split_of(item[0].text) != "eval")
    for question, first, steps in islice(asked, num_documents):
        results = _attempt(facts, first, steps, rng, [], 0.0)
        document = working(first, steps, results)
        for _ in range(rng.randint(1, 3) if rng.random() < MORE_ATTEMPTS else 0):
            reward = rng.randrange(2)
            results = _attempt(facts, first, steps, rng, results, COPY[reward])
            document += f"\n\n{phrases[reward]}\n\n{working(first, steps, results)}"
        yield question, document


class ChainsCorpus(TraceSource):
    """Corpus as demonstrations, for pre-training the tiny base model.

    Args:
        num_documents: number of documents.
        seed: seed of the documents and of the facts' errors.
        min_ops: minimum number of operations, as in the task `Chains`.
        max_ops: maximum number of operations.
    """

    def __init__(self, num_documents: int, seed: int = 0, min_ops: int = 4, max_ops: int = 8) -> None:
        self.num_documents = num_documents
        self.seed = seed
        self.min_ops, self.max_ops = min_ops, max_ops

    def traces(self, builder: PromptBuilder) -> list[Trace]:
        documents = corpus(self.num_documents, self.seed, builder.control_phrases, self.min_ops, self.max_ops)
        return [builder.demonstration(question, document) for question, document in documents]
