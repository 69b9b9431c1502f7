"""Two forked ranks: undisturbed; preempted on one and resumed; an engine that dies on one; NaN on one.

python fault_ranks.py OUT_FOLDER
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import sdzero.cli.lightning  # noqa: F401 - once, before the ranks are forked
from sdzero.cli.main import main
from sdzero.methods import SelfDistill
from sdzero.types import LossOutput
from support.ranks.faults import fit
from support.ranks.forked import forked
from support.runs import ROOT


def work(out: Path, more: list[str], engine: dict[str, Any], rank: int) -> None:
    os.chdir(ROOT)
    sys.argv = ["sdzero", *fit(out, **engine), *more]
    main()


def fit_with_nan(out: Path, rank: int) -> None:
    """The second step's loss is not a number on rank 1."""
    plain = SelfDistill.loss

    def loss(self: SelfDistill, *arguments: Any) -> LossOutput:
        output = plain(self, *arguments)
        bad = rank == 1 and self.policy_version == 1
        return LossOutput(output.loss * float("nan"), output.metrics) if bad else output

    SelfDistill.loss = loss  # pyright: ignore[reportAttributeAccessIssue]
    work(out, [], {}, rank)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for name, more, engine in (
        ("undisturbed", [], {}),
        ("preempted", [], {"fault": "term", "rank": 1, "call": 1}),
        ("preempted", ["--ckpt_path=newest"], {"fault": "die", "rank": 1, "call": 1}),
    ):
        print(name, *forked(2, out / name, partial(work, out / name, more, engine)), flush=True)
    print("nan", *forked(2, out / "nan", partial(fit_with_nan, out / "nan")), flush=True)
