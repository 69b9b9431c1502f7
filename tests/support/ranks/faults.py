"""An engine that goes wrong on one of the ranks, and the smoke recipe's second phase around it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist

from sdzero.engines import TransformersEngine
from sdzero.engines.base import EngineDied
from sdzero.types import Prompt, Rollout
from sdzero.utils.process import watchdog

FIT = [
    *("fit", "--config", "configs/recipes/smoke/self_distill.yaml", "--config", "configs/trainer/ddp.yaml"),
    *("--model.student.path=configs/tiny_model", "--model.student.weights=random", "--data.disjoint_from=null"),
    *("--data.prompts_per_step=3", "--data.num_questions=9", "--data.call_size=2", "--data.sampling.max_new_tokens=8"),
    *("--data.evaluation.num_questions=0", "--trainer.max_steps=4", "--trainer.limit_val_batches=0"),
    *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.precision=32-true"),
]


def fit(out: Path, **engine: Any) -> list[str]:
    """`sdzero`'s arguments. `engine`: those of Faulty."""
    options = [f"--data.engine.{name}={value}" for name, value in engine.items()]
    return [*FIT, "--data.engine=support.ranks.faults.Faulty", *options, f"--trainer.default_root_dir={out}"]


class Faulty(TransformersEngine):
    """Goes wrong once, in the generate call of a number, counted from 0, on a rank.

    Args:
        fault: `kill`, `raise`, `die`, `term` (is told to end), `hang` (in native code, under a watchdog of a second),
            `wait` (for ever, or until there is a file `mark`.go), or `none`; null takes the variables
            SDZERO_TEST_FAULT and SDZERO_TEST_MARK.
        rank: where.
        call: when.
        mark: a file that holds this process's id once it has happened. No fault happens where it is there.
    """

    def __init__(self, fault: str | None = "none", rank: int = 0, call: int = 1, mark: Path | None = None) -> None:
        super().__init__()
        self.fault, self.mark = fault, mark
        if fault is None:
            self.fault, self.mark = os.environ["SDZERO_TEST_FAULT"], Path(os.environ["SDZERO_TEST_MARK"])
        self.rank, self.call = rank, call
        self.num_calls = 0

    def generate(self, prompts: Sequence[Prompt], *rest: Any, **more: Any) -> list[Rollout]:
        here = dist.get_rank() if dist.is_initialized() else 0
        happened = self.mark is not None and self.mark.exists()
        self.num_calls += 1
        if self.num_calls == self.call + 1 and here == self.rank and not happened:
            self._go_wrong()
        return super().generate(prompts, *rest, **more)

    def _go_wrong(self) -> None:
        if self.mark is not None and self.fault != "none":
            self.mark.with_suffix(".part").write_text(str(os.getpid()))
            self.mark.with_suffix(".part").rename(self.mark)
        if self.fault == "raise":
            raise KeyError("something went wrong")
        if self.fault == "die":
            raise EngineDied("the engine fell over")
        if self.fault == "hang":
            with watchdog(1.0):
                ctypes.PyDLL(None).sleep(600)  # holds the interpreter: no thread and no handler of Python runs
        while self.fault == "wait" and not (self.mark and self.mark.with_suffix(".go").exists()):
            time.sleep(0.05)
        if self.fault in ("kill", "term"):
            os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGTERM)
