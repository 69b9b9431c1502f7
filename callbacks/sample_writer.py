"""Keeps responses for the eye: with their rewards and reasons, as JSON lines and as TensorBoard text."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from sdzero.callbacks.base import EvaluationReader
from sdzero.methods import Method
from sdzero.rollouts import write_text
from sdzero.types import EvalBatch, RolloutBatch, ScoredRollout

Row = dict[str, Any]


class SampleWriter(EvaluationReader):
    """Writes `samples/train-STEP-rankR.jsonl` and `samples/eval-STEP-rankR.jsonl` into the stage's folder, a response a
    line. A step that is taken again after a restart replaces its file. Evaluations are always written: the first answer
    to each of the first questions, with its revision where data.evaluation.num_revised asks for one.

    Args:
        every_n_steps: training steps between two files.
        num_samples: responses in a file, per rank.
    """

    def __init__(self, every_n_steps: int = 10, num_samples: int = 16) -> None:
        if every_n_steps < 1 or num_samples < 1:
            raise ValueError("SampleWriter: every_n_steps and num_samples must be at least 1")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.rows: list[Row] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, RolloutBatch) and batch.policy_version % self.every_n_steps == 0:
            rows = [_row(scored, batch.policy_version) for scored in batch.scored[: self.num_samples]]
            self._write(trainer, "train", batch.policy_version, rows)

    def read(self, trainer: L.Trainer, pl_module: Method, batch: EvalBatch) -> None:
        revisions = {id(first): revision for first, revision in batch.revised}
        for first in (group[0] for group in batch.groups[: self.num_samples - len(self.rows)]):
            self.rows.append(_row(first, batch.policy_version, revisions.get(id(first))))

    def finish(self, trainer: L.Trainer, pl_module: Method) -> None:
        self._write(trainer, "eval", pl_module.policy_version, self.rows)
        self.rows = []

    def _write(self, trainer: L.Trainer, kind: str, step: int, rows: list[Row]) -> None:
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{kind}-{step:06d}-rank{trainer.global_rank}.jsonl"
        write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text(f"samples/{kind}", "\n\n---\n\n".join(map(_as_text, rows)), step)


def _row(scored: ScoredRollout, step: int, revision: ScoredRollout | None = None) -> Row:
    question = scored.rollout.prompt.question
    return {
        "step": step,
        "question": question.id,
        "text": question.text,
        "answer": question.answer,
        **_judged(scored),
        "parsed": scored.verdict.parsed,
        "finish_reason": scored.rollout.finish_reason,
        "revision": None if revision is None else _judged(revision),
    }


def _judged(scored: ScoredRollout) -> Row:
    rollout, verdict = scored.rollout, scored.verdict
    return {
        "response": rollout.text,
        "reward": verdict.reward,
        "reason": verdict.reason,
        "num_tokens": len(rollout.token_ids),
    }


def _as_text(row: Row) -> str:
    """A response in Markdown. All that is not ours is indented as code: shown as it is and never rendered."""
    parts = [("Question", f"{row['text']}\n(answer: {row['answer']})")]
    parts.append((f"**{row['reason']}**, {row['num_tokens']} tokens", row["response"]))
    if row["revision"]:
        parts.append((f"revised: **{row['revision']['reason']}**", row["revision"]["response"]))
    return "\n\n".join(f"{title}\n\n{indent(text or ' ', ' ' * 4, lambda _: True)}" for title, text in parts)
