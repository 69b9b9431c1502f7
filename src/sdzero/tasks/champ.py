"""CHAMP: 270 competition problems with worked solutions (Mao et al., 2024), shipped in the package champ-dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from sdzero.tasks.hub import Row
from sdzero.tasks.math import Math
from sdzero.tasks.rows import SetAside
from sdzero.tasks.sources import Source, package_file

FILE = "package:champ_dataset/dataset_files/v0.json"

_FRAME = re.compile(  # words around the value
    r"(?:the limit exists and is equal to|the only possible value for the limit is|at (?:least|most)|exactly) "
    r"|(?: is the only possible value|(?<=[\dn@]) (?:number|pairs|roots|values|inequalities|times|integer-\w+ \w+))$",
    re.IGNORECASE,
)
_REMARK = re.compile(r" \((?:i\.e\.|none of|no such)[^()]*(?:\([^()]*\)[^()]*)*\)$")
_OTHER_FORM = re.compile(r", or (?:an equivalent|approximately).*$|^.*, or equivalently ")
_LATEX = (  # formulas are plain text: `C(n+1, 2m+1)`, `2^(n-1)`, `sum_(k=1)^n 1/k`
    (re.compile(r"\bC\(([^(),]+), ?([^(),]+)\)"), r"\\binom{\1}{\2}"),
    (re.compile(r"\bsqrt\(([^()]+)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\bfloor\(([^()]+)\)"), r"{\\lfloor \1 \\rfloor}"),
    (re.compile(r"([\^_])(?:\(([^()]+)\)|(\d\d+))"), r"\1{\2\3}"),
    (re.compile(r"\bsum_"), r"\\sum_"),
    (re.compile("±"), r"\\pm "),
    (re.compile("−"), "-"),
    (re.compile(r"\*"), r" \\cdot "),
)


class Champ(Math):
    """CHAMP's problems whose answer is a value, a formula, or Yes or No; all are in split `eval`.

    Answers that are a sentence are set aside: grading them would need a judge model.

    Raises: ModuleNotFoundError if math-verify or champ-dataset is not installed; names the extra.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__({"eval": FILE}, "_text", "_raw_answer", id_column="identifier", sizes=None, **kwargs)

    def load_rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        return [dict(row) for row in _load_problems()]

    def convert_row(self, row: Row) -> Sequence[Row]:
        return [{**row, "_raw_answer": parse_gold(row["_raw_answer"])}]


@cache
def _load_problems() -> list[Row]:
    """Load what a question needs; nearly all of the file's 72 MB are conversations with models."""
    problems = json.loads(package_file(FILE).read_text())["problems"]
    return [
        {
            **{name: problem[name] for name in ("identifier", "_text", "_raw_answer", "category")},
            "solution": "\n".join(step["_text"] for step in problem["solution"]["steps"]),
        }
        for problem in problems.values()
    ]


def parse_gold(raw: str) -> str:
    r"""Convert a published answer, with its formulas between `@@`, to LaTeX. Raises: SetAside for a sentence."""
    answer = _FRAME.sub("", _OTHER_FORM.sub("", _REMARK.sub("", raw)))
    answer = re.sub("^one(?: sequence)?$", "1", answer)
    if answer.lower() in ("yes", "no"):
        return rf"\text{{{answer}}}"
    if re.search(r"[A-Za-z]{2}", re.sub("@@.*?@@| and | or ", "", answer)):
        raise SetAside("its answer is a sentence, which needs a judge model")
    answer = re.sub(" and | or ", ", ", answer.replace("@@", ""))
    for pattern, latex in _LATEX:
        answer = pattern.sub(latex, answer)
    return answer
