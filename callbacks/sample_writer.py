"""Sampled responses with rewards and reasons for inspection, as JSON lines and TensorBoard text."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from textwrap import indent
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from sdzero.callbacks.base import EvaluationReader, rank_file
from sdzero.methods import Policy
from sdzero.trainer.shares import share_of
from sdzero.types import EvalBatch, RolloutBatch, ScoredRollout
from sdzero.utils.files import atomic_write

Row = dict[str, Any]


class SampleWriter(EvaluationReader):
    """Writes `samples/train-STEP-rankR.jsonl` and `samples/eval-STEP-rankR.jsonl` into the stage's folder.

    One response per line; `sample` numbers the responses to a question. A step that is repeated after a restart
    replaces its file. Evaluations are always written, atomically: the first response to each of the first questions,
    or all responses to all questions, with their revisions if data.evaluation.num_revised is set.

    Args:
        every_n_steps: training steps between two files.
        num_samples: responses per file and rank; null: all.
    """

    def __init__(self, every_n_steps: int = 10, num_samples: int | None = 16) -> None:
        if every_n_steps < 1 or (num_samples is not None and num_samples < 1):
            raise ValueError("SampleWriter: every_n_steps and num_samples must be at least 1 (num_samples: or null)")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self._file: SampleFile | None = None  # of the current evaluation

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        writes, step = share_of(trainer).member == 0, pl_module.policy_version
        if writes and isinstance(batch, RolloutBatch) and step % self.every_n_steps == 0:
            seen: Counter[str] = Counter()
            file = SampleFile(trainer, "train", step)
            for scored in batch.scored[: self.num_samples]:
                question = scored.rollout.prompt.question.id
                file.add(_row(scored, batch.policy_version, seen[question]))
                seen[question] += 1
            file.close()

    def read(self, trainer: L.Trainer, pl_module: Policy, batch: EvalBatch) -> None:
        if share_of(trainer).member:
            return
        if self._file is None:
            self._file = SampleFile(trainer, "eval", batch.policy_version)
        revisions = {id(first): revision for first, revision in batch.revised}
        for group in batch.groups:
            for i, scored in enumerate(group if self.num_samples is None else group[:1]):
                if self.num_samples is None or self._file.num_rows < self.num_samples:
                    self._file.add(_row(scored, batch.policy_version, i, revisions.get(id(scored))))

    def finish(self, trainer: L.Trainer, pl_module: Policy) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class SampleFile:
    """Atomic JSONL file that is written row by row, since all rows may not fit into memory; TensorBoard gets a few."""

    NUM_SHOWN = 16

    def __init__(self, trainer: L.Trainer, kind: str, step: int) -> None:
        path = rank_file(trainer, f"samples/{kind}-{step:06d}", "jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.trainer, self.tag, self.step = trainer, f"samples/{kind}", step
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_write(path))
        self.num_rows = 0
        self._shown: list[str] = []

    def add(self, row: Row) -> None:
        self._file.write(f"{json.dumps(row)}\n".encode())
        self.num_rows += 1
        if len(self._shown) < self.NUM_SHOWN:
            self._shown.append(_as_text(row))

    def close(self) -> None:
        self._stack.close()
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero:
                logger.experiment.add_text(self.tag, "\n\n---\n\n".join(self._shown), self.step)


def _row(scored: ScoredRollout, step: int, sample: int, revision: ScoredRollout | None = None) -> Row:
    question = scored.rollout.prompt.question
    return {
        "step": step,
        "question": question.id,
        "sample": sample,
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
    """Format a response as Markdown. Foreign text is indented as code, so that it is never rendered."""
    parts = [
        ("Question", f"{row['text']}\n(answer: {row['answer']})"),
        (f"**{row['reason']}**, {row['num_tokens']} tokens", row["response"]),
    ]
    if row["revision"]:
        parts.append((f"revised: **{row['revision']['reason']}**", row["revision"]["response"]))
    return "\n\n".join(f"{title}\n\n{indent(text or ' ', ' ' * 4, lambda _: True)}" for title, text in parts)
