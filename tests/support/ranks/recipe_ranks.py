"""Both phases and the evaluation of the smoke recipe on two ranks, each strategy by its config alone.

python recipe_ranks.py SMOKE_RUN OUT_FOLDER
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import sdzero.cli.lightning  # noqa: F401 - once, before the ranks are forked
from sdzero.cli.main import main
from support.ranks.forked import run_ranks
from support.runs import ROOT

STRATEGIES = {"ddp": [], "tp": ["--trainer.strategy.init_args.tensor_parallel_size=2"]}
# of two steps the second is short; and neither the questions of a step nor those of an evaluation divide by two
SAMPLES = ["--data.evaluation.num_questions=3", "--data.evaluation.call_size=2"]
SAMPLES += ["--data.evaluation.sampling.max_new_tokens=24"]
FIT = [*SAMPLES, "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
PHASE_2 = ["--data.num_questions=4", "--data.prompts_per_step=3", "--data.sampling.max_new_tokens=24"]


def stages(smoke: Path, out: Path) -> dict[str, list[str]]:
    """Name of a stage -> the command and its arguments."""
    traces, questions = smoke / "collect/traces.jsonl", smoke / "collect/questions.json"
    return {
        "srt": ["fit", *FIT, f"--model.student.path={smoke}/base/model", f"--data.source.path={traces}"],
        "self_distill": [
            *("fit", *FIT, *PHASE_2, f"--model.student.path={out}/srt/model", f"--data.disjoint_from={questions}"),
            "--trainer.max_epochs=-1",
        ],
        "eval": ["test", *SAMPLES, "--data.evaluation.num_samples=2", f"--model.student.path={out}/self_distill/model"],
    }


def work(strategy: str, smoke: Path, out: Path, rank: int) -> None:
    os.chdir(ROOT)
    for name, (command, *arguments) in stages(smoke, out).items():
        configs = [f"configs/recipes/smoke/{name}.yaml", f"configs/trainer/{strategy}.yaml"]
        where = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.precision=32-true"]
        where += [*STRATEGIES[strategy], f"--trainer.default_root_dir={out / name}"]
        sys.argv = ["sdzero", command, *(part for file in configs for part in ("--config", file)), *arguments, *where]
        main()


if __name__ == "__main__":
    smoke, out = map(Path, sys.argv[1:])
    for strategy in STRATEGIES:
        (out / strategy).mkdir()
        run_ranks(2, out / f"{strategy}-rank", partial(work, strategy, smoke, out / strategy))
