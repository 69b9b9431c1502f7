r"""Generators of the `reasoning-gym` package whose scorers are safe to run on a model's text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from sdzero.graders.errors import require_package
from sdzero.tasks.base import Task
from sdzero.tasks.boxed import last_boxed
from sdzero.tasks.splits import take
from sdzero.types import Question, Split, Verdict

SAFE = (
    "base_conversion",
    "basic_arithmetic",
    "caesar_cipher",
    "calendar_arithmetic",
    "chain_sum",
    "count_bits",
    "decimal_chain_sum",
    "gcd",
    "gsm_symbolic",
    "knights_knaves",
    "lcm",
    "letter_counting",
    "mini_sudoku",
    "products",
    "shortest_path",
    "simple_equations",
    "spell_backward",
    "syllogism",
    "word_sorting",
)
"""Generators whose scorers neither evaluate a response nor hang on one."""

POOL = 200_000  # size of a generator; gsm_symbolic allocates this many items up front


class ReasoningGym(Task):
    r"""Questions of one reasoning-gym generator, answered in `\boxed{}`.

    The reward is 1 only for a score of exactly 1: spell_backward gives 0.9999999 to the correct word with a suffix.

    Args:
        dataset: name of the generator, one of `SAFE`.
        seed: seed of the generator; the split of a question does not depend on it.
        options: settings of the generator, e.g. `{"min_terms": 2}` for chain_sum; null for its defaults.
        instruction: text appended to every question after a blank line.
    """

    def __init__(
        self,
        dataset: str,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        instruction: str = r"Please reason step by step, and put your final answer within \boxed{}.",
    ) -> None:
        if dataset not in SAFE:
            raise ValueError(
                f"task.dataset={dataset!r} is not a reasoning-gym generator with a scorer safe for model text: "
                + ", ".join(SAFE)
            )
        require_package("the ReasoningGym task", "reasoning_gym", "tasks")
        import reasoning_gym

        self.dataset, self.instruction = dataset, instruction
        self._generator = reasoning_gym.create_dataset(dataset, **{**(options or {}), "size": POOL, "seed": seed})

    def _stream(self) -> Iterator[tuple[str, Question]]:
        for index in range(POOL):
            entry = self._generator[index]
            statement = entry["question"]
            digest = hashlib.blake2b(statement.encode(), digest_size=8).hexdigest()
            id = f"reasoning_gym/{self.dataset}/{digest}"
            yield id, Question(id, f"{statement}\n\n{self.instruction}", entry["answer"], entry["metadata"])

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        return take(split, num_questions, self._stream(), f"reasoning_gym/{self.dataset}")

    def verify(self, question: Question, response: str) -> Verdict:
        answer = last_boxed(response)
        if answer is None:
            return Verdict(0, "unparseable")
        try:
            score = self._generator.score_answer(answer, {"answer": question.answer, "metadata": question.meta})
        except OverflowError:  # calendar_arithmetic divides the distance to the correct number, however long
            score = 0.0
        return Verdict(1, "correct", answer) if score == 1 else Verdict(0, "wrong", answer)
