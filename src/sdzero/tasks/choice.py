r"""Multiple choice, as in MMLU and MMLU-Pro: the answer is a letter; a response that states none gets no credit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from sdzero.tasks.boxed import last_boxed, strip_thinking
from sdzero.tasks.hub import Row
from sdzero.tasks.rows import Rows
from sdzero.tasks.sources import Source
from sdzero.types import Question, Split, Verdict

_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|boldsymbol)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"(?:\(([A-Z])\)|([A-Z]))(?:[.:)]?\s*|(?:(?<=\))|[.:)])\s+(.+))", re.DOTALL)
_LETTERS_ONLY = re.compile(r"(?:[\s,.()&:]|and|or|\b[A-Z]\b)+")
_STATED = re.compile(
    r"answer(?:\s+is)?\s*:?\s*[*_$]*\s*(?:\(([A-Z])\)(?!\s*(?:or|and|,)\b)|([A-Z])(?=[*_$]*\s*(?:[.;*_$\n]|$)))",
    re.IGNORECASE,
)


def stated_letter(response: str) -> str | None:
    r"""Return the letter stated last: in the last `\boxed{}`, else as `the answer is (B)`; None if there is none.

    A box may hold `B`, `(B)`, `\text{B}` or `B. the option's text`.
    """
    text = strip_thinking(response)
    if "\\boxed" not in text:
        stated = [one or other for one, other in _STATED.findall(text)]
        return stated[-1] if stated and stated[-1].isupper() else None
    boxed = _WRAPPED.sub(r"\1", last_boxed(text) or "").strip().strip("$")
    match = _LETTER.fullmatch(boxed)
    if not match or (match[3] and _LETTERS_ONLY.fullmatch(match[3])):  # "A. B." states two
        return None
    return match[1] or match[2]


class MultipleChoice(Rows):
    r"""Questions with a list of options; the verifier reads one letter.

    Options that are "N/A" are removed: MMLU-Pro uses them as padding.

    Args:
        path: as in Rows.
        options_column: column of the list of options, lettered from A: `choices` in MMLU, `options` in MMLU-Pro.
        answer_column: column of the correct option: its letter, or its index from 0.
        instruction: text appended after the options and a blank line; empty for none.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source],
        options_column: str = "options",
        answer_column: str = "answer",
        instruction: str = r"Please reason step by step, and put the letter of your final answer within \boxed{}.",
        **kwargs: Any,
    ) -> None:
        super().__init__(path, answer_column=answer_column, **kwargs)
        self.options_column, self.instruction = options_column, instruction

    def verify(self, question: Question, response: str) -> Verdict:
        letter = stated_letter(response)
        if letter is None or letter not in ascii_uppercase[: len(question.meta[self.options_column])]:
            return Verdict(0, "unparseable")
        return Verdict(1, "correct", letter) if letter == question.answer else Verdict(0, "wrong", letter)

    def required_columns(self) -> dict[str, str]:
        return {**super().required_columns(), "task.options_column": self.options_column}

    def convert_row(self, row: Row) -> Sequence[Row]:
        """Append the options to the question, and replace the answer by its letter."""
        listed, answer = row.get(self.options_column), row.get(str(self.answer_column))
        if not isinstance(listed, list) or not all(isinstance(option, str | int | float) for option in listed):
            raise ValueError(f"column {self.options_column!r} is not a list of options: {listed!r}")
        kept = [i for i, option in enumerate(listed) if str(option).strip() != "N/A"]
        correct = _option_index("" if answer is None else str(answer).strip())
        if correct not in kept or not 2 <= len(kept) <= len(ascii_uppercase):
            raise ValueError(f"the answer {str(answer)!r} is not one of its {len(kept)} options: {listed!r}")
        options = [str(listed[i]).strip() for i in kept]
        lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
        text = str(row.get(self.question_column) or "").strip()
        return [
            {
                **row,
                # part of the question's identity: many ask "Which of these is true?"
                self.question_column: "\n".join([text, "", *lines]) if text else "",
                str(self.answer_column): ascii_uppercase[kept.index(correct)],
                self.options_column: options,
            }
        ]


def _option_index(answer: str) -> int | None:
    """Return the index of an answer written as an index or as a letter."""
    if answer.isascii() and answer.isdigit():
        return int(answer)
    return ascii_uppercase.index(answer) if len(answer) == 1 and answer in ascii_uppercase else None
