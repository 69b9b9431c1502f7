"""OpenR1-Math-220k: the paper's mathematics training questions and its 500 held-out ones (appendix C.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdzero.tasks.hub import HubDataset, Row
from sdzero.tasks.math import Math
from sdzero.tasks.rows import SetAside
from sdzero.tasks.sources import Source
from sdzero.tasks.splits import Sizes
from sdzero.types import Question, Split

COMPETITIONS = (
    "amc_aime",
    "aops_forum",
    "cn_contest",
    "inequalities",
    "number_theory",
    "olympiads",
    "olympiads_ref",
)
"""Sources of the `default` configuration: all competitions and olympiads. `extended` adds others, such as cn_k12."""

OPENR1 = HubDataset(
    "open-r1/OpenR1-Math-220k",
    config="default",
    revision="e4e141ec9dea9f8326f4d347be56105859b2bd68",  # as pinned in public code; not verified
    columns=("solution",),
    streaming=True,  # 93,733 rows in gigabytes, nearly all of them the generations, which are not read
)


class OpenR1Math(Math):
    """OpenR1-Math-220k's competition and olympiad problems with at least one verified generation.

    Other sources, proofs, rows without an answer and rows without a verified generation are counted by reason in
    `set_aside`. `meta` holds the reference `solution`, which the Demonstration context reads.

    Args:
        path: source, or one per split. To evaluate on the held-out questions, use the path and sizes of the training.
        sources: values of the column `source` to keep; null keeps all.
        verified: keep only questions with a generation that is correct by math-verify (`correctness_math_verify`).
        sizes: number of questions per split; null splits by hash.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source] = OPENR1,
        sources: tuple[str, ...] | None = COMPETITIONS,
        verified: bool = True,
        sizes: Sizes | None = Sizes(),
        **kwargs: Any,
    ) -> None:
        super().__init__(path, "problem", "answer", id_column="uuid", sizes=sizes, **kwargs)
        self.sources, self.verified = sources, verified

    def required_columns(self) -> dict[str, str]:
        filters = {"task.sources": "source"} if self.sources is not None else {}
        filters |= {"task.verified": "correctness_math_verify"} if self.verified else {}
        return {**super().required_columns(), "task.path": "question_type", **filters}

    def load_rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        """Read the rows. Raises: ValueError for a name in `sources` that no row has."""
        rows = super().load_rows(source, columns)
        found = {row.get("source") for row in rows}
        if unknown := [name for name in self.sources or () if name not in found and name not in COMPETITIONS]:
            raise ValueError(f"task.sources: {source} has no source {unknown[0]!r}; it has {sorted(map(str, found))}")
        return rows

    def dedup_key(self, question: Question) -> str:
        """Return the text without case and spaces: the sources copy from each other."""
        return "".join(question.text.casefold().split())

    def convert_row(self, row: Row) -> Sequence[Row]:
        answer = str(row.get("answer") or "").strip().lower()
        if self.sources is not None and row.get("source") not in self.sources:
            raise SetAside("its source is not in task.sources")
        if row.get("question_type") == "proof" or answer in ("", "proof", "notfound"):
            raise SetAside("it asks for a proof, or has no answer")
        if self.verified and not any(row.get("correctness_math_verify") or ()):
            raise SetAside("no generation was verified")
        return super().convert_row(row)
