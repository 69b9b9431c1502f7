"""Right or wrong: the verifier of the questions in questions.jsonl."""

from __future__ import annotations

import re

from sdzero.tasks import Rows
from sdzero.types import Question, Verdict


class LastDigit(Rows):
    """The answer is the digit after the last `A`, at the very end."""

    def verify(self, question: Question, response: str) -> Verdict:
        found = re.search(r"A *([0-9])$", response.strip())
        if found is None:
            return Verdict(0, "unparseable")
        if found[1] == question.answer:
            return Verdict(1, "correct", found[1])
        return Verdict(0, "wrong", found[1])
