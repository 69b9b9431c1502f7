r"""Multiple choice, as in MMLU and MMLU-Pro: the answer is a letter, and nothing is guessed where none is stated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from sdzero.tasks.boxed import after_thought, last_boxed
from sdzero.tasks.files import Row
from sdzero.tasks.hub import HubDataset
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
        max_dropped_share: as in Rows.
    """

    def __init__(
        self,
        path: str | HubDataset | dict[Split, str | HubDataset],
        question_column: str = "question",
        options_column: str = "options",
        answer_column: str = "answer",
        id_column: str | None = None,
        instruction: str = r"Please reason step by step, and put the letter of your final answer within \boxed{}.",
        max_dropped_share: float = 0.05,
    ) -> None:
        super().__init__(path, question_column, answer_column, id_column, max_dropped_share)
        self.options_column, self.instruction = options_column, instruction

    def verify(self, question: Question, response: str) -> Verdict:
        letter = stated_letter(response)
        if letter is None or letter not in ascii_uppercase[: len(question.meta[self.options_column])]:
            return Verdict(0, "unparseable")
        return Verdict(1, "correct", letter) if letter == question.answer else Verdict(0, "wrong", letter)

    def asked(self, question: Question) -> str:
        return f"{question.text}\n\n{self.instruction}" if self.instruction else question.text

    def columns(self) -> dict[str, str]:
        return {**super().columns(), "task.options_column": self.options_column}

    def prepare(self, row: Row) -> Sequence[Row]:
        """The question with its options below, and the letter of the right one."""
        listed, answer = row.get(self.options_column), row.get(str(self.answer_column))
        if not isinstance(listed, list) or not all(isinstance(option, str | int | float) for option in listed):
            raise ValueError(f"column {self.options_column!r} holds no list of options: {listed!r}")
        kept = [i for i, option in enumerate(listed) if str(option).strip() != "N/A"]
        right = _index("" if answer is None else str(answer).strip())
        if right not in kept or not 2 <= len(kept) <= len(ascii_uppercase):
            raise ValueError(f"the answer {str(answer)!r} is none of its {len(kept)} options: {listed!r}")
        options = [str(listed[i]).strip() for i in kept]
        lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
        asked = str(row.get(self.question_column) or "").strip()
        return [
            {
                **row,
                # many ask "Which of these is true?": the options are part of the question
                self.question_column: "\n".join([asked, "", *lines]) if asked else "",
                str(self.answer_column): ascii_uppercase[kept.index(right)],
                self.options_column: options,
            }
        ]


def _index(answer: str) -> int | None:
    """The index that an answer column's 2, or C, stands for."""
    if answer.isascii() and answer.isdigit():
        return int(answer)
    return ascii_uppercase.index(answer) if len(answer) == 1 and answer in ascii_uppercase else None
