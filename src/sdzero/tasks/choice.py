r"""Multiple choice, as in MMLU and MMLU-Pro: the answer is a letter, and nothing is guessed where none is stated."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase

from sdzero.tasks.boxed import after_thought, last_boxed
from sdzero.tasks.rows import Rows
from sdzero.types import Question, Split, Verdict

_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|boldsymbol)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"(?:\(([A-Z])\)|([A-Z]))(?:[.:)]?\s*|(?:(?<=\))|[.:)])\s+(.+))", re.DOTALL)
_LETTERS_ONLY = re.compile(r"(?:[\s,.()&:]|and|or|\b[A-Z]\b)+")
_STATED = re.compile(
    r"answer(?:\s+is)?\s*:?\s*[*_$]*\s*(?:\(([A-Z])\)(?!\s*(?:or|and|,)\b)|([A-Z])(?=[*_$]*\s*(?:[.;*_$\n]|$)))",
    re.IGNORECASE,
)


def stated_letter(response: str) -> str | None:
    r"""The letter that a response gives last: in its last `\boxed{}`, else as `the answer is (B)`. None: there is none.

    A box may hold `B`, `(B)`, `\text{B}` or `B. the option's text`.
    """
    said = after_thought(response)
    if "\\boxed" not in said:
        stated = [one or other for one, other in _STATED.findall(said)]
        return stated[-1] if stated and stated[-1].isupper() else None
    boxed = _WRAPPED.sub(r"\1", last_boxed(said) or "").strip().strip("$")
    match = _LETTER.fullmatch(boxed)
    if not match or (match[3] and _LETTERS_ONLY.fullmatch(match[3])):  # "A. B." states two
        return None
    return match[1] or match[2]


class MultipleChoice(Rows):
    r"""Questions of a file with a list of options; the verifier reads one letter.

    Options that say "N/A" are left out, as MMLU-Pro pads with them.

    Args:
        path: as in Rows.
        question_column: as in Rows.
        options_column: column of the list of options, lettered from A on: `choices` in MMLU, `options` in MMLU-Pro.
        answer_column: column of the right option: its letter, or its index from 0 on.
        id_column: as in Rows; null takes a hash of the question and its options.
        instruction: appended after the options and a blank line; empty leaves it out.
    """

    def __init__(
        self,
        path: str | dict[Split, str],
        question_column: str = "question",
        options_column: str = "options",
        answer_column: str = "answer",
        id_column: str | None = None,
        instruction: str = r"Please reason step by step, and put the letter of your final answer within \boxed{}.",
    ) -> None:
        super().__init__(path, question_column, answer_column, id_column)
        self.options_column, self.instruction = options_column, instruction

    def verify(self, question: Question, response: str) -> Verdict:
        letter = stated_letter(response)
        if letter is None or letter not in ascii_uppercase[: len(question.meta[self.options_column])]:
            return Verdict(0, "unparseable")
        return Verdict(1, "correct", letter) if letter == question.answer else Verdict(0, "wrong", letter)

    @cached_property
    def _all(self) -> list[tuple[Split, Question]]:
        end = f"\n\n{self.instruction}" if self.instruction else ""
        return [(split, replace(question, text=question.text + end)) for split, question in super()._all]

    def _read(self, path: Path) -> Iterator[tuple[str, Question]]:
        """Raises: ValueError naming the row whose options or answer are none."""
        for row, question in super()._read(path):
            listed = question.meta.get(self.options_column)
            if not isinstance(listed, list) or not all(isinstance(option, str | int | float) for option in listed):
                raise ValueError(
                    f"{row}: task.options_column: column {self.options_column!r} holds no list of options: {listed!r}; "
                    f"the row has {sorted(question.meta)}"
                )
            kept = [i for i, option in enumerate(listed) if str(option).strip() != "N/A"]
            right = _index(question.answer)
            if right not in kept or not 2 <= len(kept) <= len(ascii_uppercase):
                raise ValueError(
                    f"{row}: the answer {question.answer!r} is none of its {len(kept)} options: {listed!r}"
                )
            options = [str(listed[i]).strip() for i in kept]
            lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
            text = "\n".join([question.text, "", *lines])
            digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()  # many ask "Which of these is true?"
            yield (
                row,
                replace(
                    question,
                    id=question.id if self.id_column else f"{question.id.partition('/')[0]}/{digest}",
                    text=text,
                    answer=ascii_uppercase[kept.index(right)],
                    meta={**question.meta, self.options_column: options},
                ),
            )


def _index(answer: str) -> int | None:
    """The index that an answer column's 2, or C, stands for."""
    if answer.isascii() and answer.isdigit():
        return int(answer)
    return ascii_uppercase.index(answer) if len(answer) == 1 and answer in ascii_uppercase else None
