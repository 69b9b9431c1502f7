"""Per-token KL between student and reviser on sampled responses (section 4.1, figure 4)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sdzero.callbacks.base import EvaluationReader, drop_nan, rank_file
from sdzero.evaluation.metrics import Ratios
from sdzero.evaluation.statistics import top_share
from sdzero.losses import Divergence, divergence_head
from sdzero.losses.soft_targets import HiddenTargets, hidden_targets, top_k_targets
from sdzero.methods import Policy
from sdzero.methods.batching import collate, filler_example, micro_batches
from sdzero.types import EvalBatch, Example, RolloutBatch, ScoredRollout
from sdzero.utils.files import atomic_write

log = logging.getLogger(__name__)

Row = dict[str, Any]


class TokenKLRecorder(EvaluationReader):
    """Writes `token_kl/train-STEP-rankR.parquet` and `token_kl/eval-STEP-rankR.parquet` into the stage's folder.

    One row per response; a step that is repeated after a restart replaces its file. Per token: `kl`, KL(student ||
    teacher) over the whole vocabulary; `token_kl_reward`, log student - log teacher of the sampled token, positive if
    the reviser finds it less likely; and the most likely tokens of both. The teacher is the method's; a method without
    one (SRT) is its own reviser, which reads x, y and P_r. Computed before the step, in separate forward passes. Logs
    `kl_top10_share_r0` and `_r1` under teacher/ or eval/: the share of a response's KL in the top tenth of its tokens.

    Args:
        every_n_steps: training steps between two files. Evaluations are always recorded.
        num_responses: responses per file and rank; of an evaluation, the first response to each of the first questions.
        top_k: most likely tokens kept of each distribution.
    """

    def __init__(self, every_n_steps: int = 10, num_responses: int = 32, top_k: int = 5) -> None:
        if min(every_n_steps, num_responses, top_k) < 1:
            raise ValueError("TokenKLRecorder: every_n_steps, num_responses and top_k must be at least 1")
        self.every_n_steps = every_n_steps
        self.num_responses = num_responses
        self.top_k = top_k
        self.rows: list[Row] = []
        self.shares = Ratios("kl_top10_share_r0", "kl_top10_share_r1")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        if isinstance(batch, RolloutBatch) and pl_module.policy_version % self.every_n_steps == 0:
            self._record(pl_module, batch.scored[: self.num_responses], batch.scored)
            self._write(trainer, pl_module, "train")

    def read(self, trainer: L.Trainer, pl_module: Policy, batch: EvalBatch) -> None:
        chosen = [group[0] for group in batch.groups[: self.num_responses - len(self.rows)]]
        self._record(pl_module, chosen, batch.scored)

    def _record(self, method: Policy, chosen: Sequence[ScoredRollout], siblings: Sequence[ScoredRollout]) -> None:
        rows = score_tokens(method, chosen, siblings, self.top_k)
        for row in rows:
            self.shares.update(**{f"kl_top10_share_r{row['reward']}": (top_share(row["kl"]), 1)})
        self.rows += rows

    def finish(self, trainer: L.Trainer, pl_module: Policy) -> None:
        self._write(trainer, pl_module, "eval")

    def _write(self, trainer: L.Trainer, pl_module: Policy, kind: str) -> None:
        path = rank_file(trainer, f"token_kl/{kind}-{pl_module.policy_version:06d}", "parquet")
        if self.rows and pl_module.share.member == 0:
            import pyarrow as pa
            from pyarrow import parquet

            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                parquet.write_table(pa.Table.from_pylist(self.rows), file)
        self.rows = []
        self.shares.to(pl_module.device).process_group = pl_module.share.across
        shares = drop_nan(self.shares.compute())
        self.shares.reset()
        if kind == "eval":
            pl_module.log_dict({f"eval/{name}": value for name, value in shares.items()}, rank_zero_only=True)
        else:  # not by Lightning's own log, which would repeat the values at the steps in between
            for logger in trainer.loggers:
                logger.log_metrics({f"teacher/{name}": float(v) for name, v in shares.items()}, trainer.global_step)


@torch.no_grad()
def score_tokens(
    method: Policy, scored: Sequence[ScoredRollout], siblings: Sequence[ScoredRollout], top_k: int
) -> list[Row]:
    """Return a row for each response that is not empty and fits the model with its teacher context. Collective.

    Args:
        method: student and reviser.
        scored: responses to record, in order.
        siblings: responses among which a context may look for others to the same question.
        top_k: most likely tokens kept of each distribution.
    """
    context = method.teacher_and_context()[1]
    examples = []
    for place, one in enumerate(scored):
        question = one.rollout.prompt.question
        group = [s for s in siblings if s.rollout.prompt.question.id == question.id]
        read = context(method.builder, one, group).token_ids
        examples.append(Example(str(place), one.rollout.prompt.token_ids, one.rollout.token_ids, teacher_context=read))
    fitting = [e for e in examples if e.target and e.length <= method.max_positions]
    if num_left_out := len(examples) - len(fitting):
        log.warning("token KL: left out %d responses that are empty or too long with their context", num_left_out)
    batches = micro_batches(fitting, method.max_tokens_per_micro_batch)
    num_batches = int(method.reduce(torch.tensor(len(batches)), "max"))
    batches += [[filler_example(method.builder.pad_id)]] * (num_batches - len(batches))
    rows = {}
    for batch in batches:
        values = _forward(method, batch, min(top_k, method.hf_config.vocab_size))
        for example, row in zip(batch, values, strict=True):
            if example.id:
                rows[int(example.id)] = {**_about(method, scored[int(example.id)]), **row}
    return [rows[place] for place in sorted(rows)]


def _forward(method: Policy, examples: Sequence[Example], top_k: int) -> list[Row]:
    """Compute the columns with one entry per token, of each example."""
    targets, pad = [e.target for e in examples], method.builder.pad_id
    student_batch = collate([e.context for e in examples], targets, pad).to(method.device)
    teacher_batch = collate([e.teacher_context for e in examples], targets, pad).to(method.device)

    def head(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
        ones = torch.ones(len(hidden), device=hidden.device)
        targets = student_batch.targets
        values = divergence_head(hidden, weight, teacher, ones, 1.0, Divergence(), targets=targets).metrics
        for who, states in (("student", HiddenTargets(hidden, weight)), ("teacher", teacher)):
            top = top_k_targets(states.hidden, states.weight, targets, top_k)
            logprobs, order = top.logprobs.sort(descending=True)
            values[f"{who}_top_ids"], values[f"{who}_top_probs"] = top.ids.gather(1, order), logprobs.exp()
        return values

    with method.trainer.precision_plugin.forward_context():
        teacher = method.teacher_and_context()[0](teacher_batch.input_ids, teacher_batch.predicts, hidden_targets)
        values = method.student(student_batch.input_ids, student_batch.predicts, head)
    lengths = [len(target) for target in targets]
    columns = {name: [part.tolist() for part in value.cpu().split(lengths)] for name, value in values.items()}
    rows: list[Row] = []
    for i in range(len(examples)):
        of_one = {name: column[i] for name, column in columns.items()}
        student, teacher = of_one["student_logprobs"], of_one["teacher_logprobs"]
        row: Row = {
            "kl": of_one["divergence"],
            "token_kl_reward": [s - t for s, t in zip(student, teacher, strict=True)],
            "student_logprob": student,
            "teacher_logprob": teacher,
        }
        for model in ("student", "teacher"):
            row[f"{model}_top"] = [_pieces(method, ids) for ids in of_one[f"{model}_top_ids"]]
            row[f"{model}_top_prob"] = of_one[f"{model}_top_probs"]
        rows.append(row)
    return rows


def _pieces(method: Policy, ids: Sequence[int]) -> list[str]:
    return [method.builder.tokenizer.decode([i]) for i in ids]


def _about(method: Policy, scored: ScoredRollout) -> Row:
    rollout, question = scored.rollout, scored.rollout.prompt.question
    return {
        "step": method.policy_version,
        "question": question.id,
        "text": question.text,
        "answer": question.answer,
        "response": rollout.text,
        "reward": scored.verdict.reward,
        "reason": scored.verdict.reason,
        "token_ids": list(rollout.token_ids),
        "tokens": _pieces(method, rollout.token_ids),
    }
