"""Evaluates a suite with a scripted engine on one rank and on two, and saves the metrics.

python evaluate_ranks.py MODEL_FOLDER OUT_FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdzero.data import Evaluation, EvaluationDataModule
from sdzero.methods import Policy
from sdzero.models.language_model import ModelConfig
from sdzero.tasks import Suite
from sdzero.trainer.strategies import FullShard
from sdzero.types import Prompt, Sampling
from support.helpers import Notes, Toy, make_trainer
from support.ranks.forked import run_ranks

STRATEGIES: dict[str, tuple[int, Callable[[], Any]]] = {  # name -> number of ranks, strategy
    "one": (1, lambda: "auto"),
    "ddp": (2, lambda: "ddp"),
    "tp": (2, lambda: FullShard(tensor_parallel_size=2)),
}
NUM_QUESTIONS = {"x": 4, "y": 1, "z": 1}  # the second rank is asked nothing of y, the first nothing of z


def say(prompt: Prompt, seed: int) -> str:
    return "1" * 99 if prompt.question.answer == "3" else "so 1"


def evaluate(ranks: int, strategy: Callable[[], Any], model: str, out: Path, rank: int) -> None:
    suite = Suite({name: Toy() for name in NUM_QUESTIONS}, NUM_QUESTIONS)
    settings = Evaluation(num_questions=None, num_samples=2, sampling=Sampling(max_new_tokens=9), call_size=2)
    trainer = make_trainer(out.with_suffix(""), devices=ranks, strategy=strategy())
    method = Policy(ModelConfig(model))
    trainer.test(method, EvaluationDataModule(suite, Notes(say), settings, max_logprob_gap=99), verbose=False)
    asked = [{*method.eval_rewards}]
    if ranks > 1:
        asked = [set()] * ranks
        torch.distributed.all_gather_object(asked, {*method.eval_rewards})
    if trainer.is_global_zero:
        torch.save({"metrics": dict(trainer.callback_metrics), "asked": asked}, out)


def main(model: str, out: Path) -> None:
    for name, (ranks, strategy) in STRATEGIES.items():
        work = partial(evaluate, ranks, strategy, model, out / f"evaluate-{name}.pt")
        run_ranks(ranks, out / f"evaluate-{name}-rank", work)
