"""OpenR1-Math-220k: the paper's training questions of mathematics, and its 500 held-out ones (appendix C.1)."""

from __future__ import annotations

from collections.abc import Sequence

from sdzero.tasks.files import Row
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.math import INSTRUCTION, Math
from sdzero.tasks.rows import SetAside, Source
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
"""The sources of its `default` configuration. All are competitions and olympiads: what `extended` adds, as cn_k12, is
not."""

OPENR1 = HubDataset(
    "open-r1/OpenR1-Math-220k",
    config="default",
    revision="e4e141ec9dea9f8326f4d347be56105859b2bd68",  # as pinned in public code; not checked from here
    columns=("solution",),
    streaming=True,  # 93,733 rows in gigabytes, nearly all of them the generations, which are not read
)


class OpenR1Math(Math):
    """OpenR1-Math-220k's problems from competitions and olympiads whose answer a generation was verified to reach.

    Rows from other sources, proofs, rows without an answer and rows without a verified generation are set aside, and
    counted by reason in `set_aside`. `meta` holds the written `solution`, which the Demonstration context reads.

    Args:
        path: as in Rows. An evaluation of the held-out questions names the path and the sizes of the training.
        sources: values of the column `source` whose rows are asked; null asks all.
        verified: asks only questions that at least one generation answers rightly by math-verify
            (`correctness_math_verify`).
        instruction: as in Math.
        num_workers: as in Math.
        deadline: as in Math.
        max_dropped_share: as in Rows.
        sizes: as in Rows; null deals them out by their hash.

    Raises:
        ModuleNotFoundError: math-verify or pebble is not installed; names the extra.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source] = OPENR1,
        sources: tuple[str, ...] | None = COMPETITIONS,
        verified: bool = True,
        instruction: str = INSTRUCTION,
        num_workers: int = 2,
        deadline: float = 3.0,
        max_dropped_share: float = 0.05,
        sizes: Sizes | None = Sizes(),
    ) -> None:
        super().__init__(
            path, "problem", "answer", "uuid", instruction, num_workers, deadline, max_dropped_share, sizes
        )
        self.sources, self.verified = sources, verified

    def columns(self) -> dict[str, str]:
        filters = {"task.sources": "source"} if self.sources is not None else {}
        filters |= {"task.verified": "correctness_math_verify"} if self.verified else {}
        return {**super().columns(), "task.path": "question_type", **filters}

    def rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        """Raises: ValueError for a name in `sources` that is no source's."""
        rows = super().rows(source, columns)
        if self.sources is not None:
            found = {row.get("source") for row in rows}
            if unknown := [name for name in self.sources if name not in found and name not in COMPETITIONS]:
                raise ValueError(
                    f"task.sources: {source} has no source {unknown[0]!r}; it has {sorted(map(str, found))}"
                )
        return rows

    def key(self, question: Question) -> str:
        """Without case and spaces: its sources copy from each other."""
        return "".join(question.text.casefold().split())

    def prepare(self, row: Row) -> Sequence[Row]:
        if self.sources is not None and row.get("source") not in self.sources:
            raise SetAside("its source is none of task.sources")
        if row.get("question_type") == "proof" or str(row.get("answer") or "").strip().lower() in (
            "",
            "proof",
            "notfound",
        ):
            raise SetAside("it asks for a proof, or has no answer")
        if self.verified and not any(row.get("correctness_math_verify") or ()):
            raise SetAside("no generation was verified")
        return super().prepare(row)
