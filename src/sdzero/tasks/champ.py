"""CHAMP: 270 problems of competitions with written solutions (Mao et al., 2024), in the package champ-dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache

from sdzero.tasks.files import Row, package_file
from sdzero.tasks.math import INSTRUCTION, Math
from sdzero.tasks.rows import SetAside, Source
from sdzero.tasks.splits import Sizes
from sdzero.types import Split

FILE = "package:champ_dataset/dataset_files/v0.json"

_FRAME = re.compile(  # what stands around the value that a model is to give
    r"(?:the limit exists and is equal to|the only possible value for the limit is|at (?:least|most)|exactly) "
    r"|(?: is the only possible value|(?<=[\dn@]) (?:number|pairs|roots|values|inequalities|times|integer-\w+ \w+))$",
    re.IGNORECASE,
)
_REMARK = re.compile(r" \((?:i\.e\.|none of|no such)[^()]*(?:\([^()]*\)[^()]*)*\)$")
_OTHER_FORM = re.compile(r", or (?:an equivalent|approximately).*$|^.*, or equivalently ")
_LATEX = (  # its formulas are plain text: `C(n+1, 2m+1)`, `2^(n-1)`, `sum_(k=1)^n 1/k`
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
    """The problems whose answer is a value, a formula, or Yes or No; without `sizes` all are of split `eval`.

    Answers that are a sentence are set aside: a response would have to hit upon its very words.

    Args:
        instruction: as in Math.
        num_workers: as in Math.
        deadline: as in Math.
        max_dropped_share: as in Rows.
        sizes: as in Rows.

    Raises:
        ModuleNotFoundError: math-verify, pebble or champ-dataset is not installed; names the extra.
    """

    def __init__(
        self,
        instruction: str = INSTRUCTION,
        num_workers: int = 2,
        deadline: float = 3.0,
        max_dropped_share: float = 0.05,
        sizes: Sizes | None = None,
    ) -> None:
        path: Source | dict[Split, Source] = FILE if sizes is not None else {"eval": FILE}
        super().__init__(
            path, "_text", "_raw_answer", "identifier", instruction, num_workers, deadline, max_dropped_share, sizes
        )

    def rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        return [dict(row) for row in _published()]

    def prepare(self, row: Row) -> Sequence[Row]:
        return [{**row, "_raw_answer": gold(row["_raw_answer"])}]


@cache
def _published() -> list[Row]:
    """What a question is made of; nearly all of the file's 72 MB are conversations with models."""
    problems = json.loads(package_file(FILE).read_text())["problems"]
    return [
        {
            **{name: problem[name] for name in ("identifier", "_text", "_raw_answer", "category")},
            "solution": "\n".join(step["_text"] for step in problem["solution"]["steps"]),
        }
        for problem in problems.values()
    ]


def gold(raw: str) -> str:
    r"""The LaTeX of an answer as it is published, with its formulas between `@@`.

    Raises:
        SetAside: it is a sentence.
    """
    said = _FRAME.sub("", _OTHER_FORM.sub("", _REMARK.sub("", raw)))
    said = re.sub("^one(?: sequence)?$", "1", said)
    if said.lower() in ("yes", "no"):
        return rf"\text{{{said}}}"
    if re.search(r"[A-Za-z]{2}", re.sub("@@.*?@@| and | or ", "", said)):
        raise SetAside("its answer is a sentence, which needs a judge model")
    said = re.sub(" and | or ", ", ", said.replace("@@", ""))
    for pattern, latex in _LATEX:
        said = pattern.sub(latex, said)
    return said
