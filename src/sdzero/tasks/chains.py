"""Left-to-right digit arithmetic modulo 10: the quickstart's task, small enough for a 163K-parameter model on a CPU."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import accumulate

from sdzero.tasks.base import Task
from sdzero.tasks.splits import take
from sdzero.types import Question, Split, Verdict
from sdzero.utils.seeds import derive_seed

OPERATORS = "+-*"
Step = tuple[str, int]
"""An operator and its right operand."""


def apply(value: int, operator: str, operand: int) -> int:
    """Compute one step of a chain, modulo 10."""
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[operator] % 10


def working(first: int, steps: list[Step], results: list[int]) -> str:
    """Write out an answer, e.g. `6+3=9*9=1-4=7A7`; `results` may be wrong."""
    written = "".join(f"{op}{operand}={result}" for (op, operand), result in zip(steps, results, strict=True))
    return f"{first}{written}A{results[-1]}"


def solve(first: int, steps: list[Step]) -> list[int]:
    """Return the correct result after every step."""
    return [*accumulate(steps, lambda value, step: apply(value, *step), initial=first)][1:]


class Chains(Task):
    """Chains such as `6+3*9-4=`, evaluated left to right, modulo 10; the answer is the digit after the last `A`.

    Args:
        seed: seed of the question stream; the split of a question does not depend on it.
        min_ops: minimum number of operations.
        max_ops: maximum number of operations.
    """

    def __init__(self, seed: int = 0, min_ops: int = 4, max_ops: int = 8) -> None:
        if not 1 <= min_ops <= max_ops:
            raise ValueError(f"min_ops={min_ops} and max_ops={max_ops}: 1 <= min_ops <= max_ops must hold")
        self.seed, self.min_ops, self.max_ops = seed, min_ops, max_ops

    def stream(self, name: str) -> Iterator[tuple[Question, int, list[Step]]]:
        """Yield random questions endlessly, each with its first digit and its steps; they may repeat."""
        rng = random.Random(derive_seed(self.seed, "chains", name))
        while True:
            first = rng.randrange(10)
            steps = [(rng.choice(OPERATORS), rng.randrange(10)) for _ in range(rng.randint(self.min_ops, self.max_ops))]
            text = f"{first}{''.join(f'{op}{operand}' for op, operand in steps)}="
            answer = str(solve(first, steps)[-1])
            yield Question(f"chains/{text}", text, answer), first, steps

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        stream = ((question.text, question) for question, _, _ in self.stream("questions"))
        return take(split, num_questions, stream, "chains")

    def verify(self, question: Question, response: str) -> Verdict:
        found = re.search(r"A\s*([0-9])\s*\Z", response)
        if found is None:
            return Verdict(0, "unparseable")
        return Verdict(1, "correct", found[1]) if found[1] == question.answer else Verdict(0, "wrong", found[1])
