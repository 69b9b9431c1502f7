"""The policy: the student with everything that a method, an evaluation and a rollout engine need of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sdzero.evaluation.metrics import BenchmarkMetrics, average_benchmarks
from sdzero.losses import cross_entropy_head
from sdzero.methods.batching import collate, filler_example
from sdzero.methods.contexts import Context, Revision
from sdzero.models.language_model import LanguageModel, ModelConfig, load, max_positions
from sdzero.models.parallelize import check_parallel, shard
from sdzero.models.weights import full_weights
from sdzero.trainer.rng_state import gather_rng_states, restore_rng_states
from sdzero.trainer.shares import Share, share_of
from sdzero.types import EvalBatch, LossOutput, Rollout, TokenIds
from sdzero.utils.seeds import run_seed


class Policy(L.LightningModule):
    """The student, loaded, sharded, checkpointed and evaluated, but not trained (`sdzero validate|test|predict`).

    Args:
        student: the policy that is sampled from, and trained by a method.
        max_tokens_per_micro_batch: rows x longest row of a forward pass in tokens, counted on the longer of the
            student's and the teacher's sequence; the sum of the sequences if packed (`student.attn_implementation`).
    """

    counters: tuple[str, ...] = ("policy_version",)
    """Attributes that a checkpoint holds."""

    def __init__(self, student: ModelConfig, max_tokens_per_micro_batch: int = 8192) -> None:
        super().__init__()
        self.student_config: ModelConfig = student
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.builder = student.builder()
        self.hf_config = student.hf_config()
        self.max_positions = max_positions(self.hf_config)
        self.policy_version = 0
        self.eval_benchmarks: tuple[str, ...] = ()
        self.eval_metrics = nn.ModuleList()  # one BenchmarkMetrics per benchmark
        self.eval_rewards: dict[str, list[int]] = {}
        self._random_states: list[dict[str, Any]] | None = None  # from a checkpoint, until the first step

    # --- set-up and checkpoints ---------------------------------------------------------------

    def setup(self, stage: str) -> None:
        check_parallel(self.student_config, self.hf_config, self.trainer.strategy, self.share.num_members)

    def configure_model(self) -> None:
        if not hasattr(self, "student"):
            self.student = self.shard(load(self.student_config, run_seed()), self.student_config)

    def shard(self, model: LanguageModel, config: ModelConfig) -> nn.Module:
        """Wrap a model as the Trainer's strategy and precision require."""
        compute_dtype = torch.bfloat16 if "bf16" in str(self.trainer.precision) else None
        return shard(model, config, self.trainer.strategy, compute_dtype)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sdzero"] = {name: getattr(self, name) for name in self.counters}
        checkpoint["random_states"] = gather_rng_states(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["sdzero"].items():
            setattr(self, name, value)
        self._random_states = checkpoint.get("random_states", [])

    def on_train_start(self) -> None:
        if self._random_states is not None:  # not on loading: what runs between the two uses random numbers
            restore_rng_states(
                self._random_states, self.device, self.global_rank, self.trainer.world_size, self.global_step
            )
            self._random_states = None

    # --- for engines and callbacks ------------------------------------------------------------

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the student's full weights by Hugging Face name. Collective: every rank must consume all of them."""
        return full_weights(self.student)

    @torch.no_grad()
    def policy_logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Compute untempered log-probabilities of sampled responses, in nats, one tensor [N] each. Collective.

        One response at a time: the engine is awake and holds the memory that a larger batch would need.
        """
        filler = filler_example(self.builder.pad_id)
        num_passes = int(self.reduce(torch.tensor(max(len(rollouts), 1)), "max"))  # the same on every rank
        rows = [(r.prompt.token_ids, r.token_ids) for r in rollouts]
        rows += [(filler.context, filler.target)] * (num_passes - len(rows))
        return [self._logprobs(*row) for row in rows][: len(rollouts)]

    def _logprobs(self, context: TokenIds, target: TokenIds) -> Tensor:
        batch = collate([context], [target], self.builder.pad_id).to(self.device)
        ones = torch.ones(len(batch.targets), device=self.device)

        def head(hidden: Tensor, weight: Tensor) -> LossOutput:
            return cross_entropy_head(hidden, weight, batch.targets, ones, len(batch.targets))

        with self.trainer.precision_plugin.forward_context():
            return self.student(batch.input_ids, batch.predicts, head).metrics["logprobs"]

    def teacher_and_context(self) -> tuple[Callable[..., Any], Context]:
        """Return the model that scores the tokens of a response, and its context; without a teacher, the student."""
        return self.student, Revision()

    # --- evaluation ---------------------------------------------------------------------------

    def predict_step(self, batch: EvalBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return the responses as plain rows: question, response, reward, reason."""
        rows = ((s.rollout.prompt.question.id, s.rollout.text, s.verdict) for s in batch.scored)
        return [{"question": q, "response": text, "reward": v.reward, "reason": v.reason} for q, text, v in rows]

    def on_test_epoch_start(self) -> None:
        self.eval_rewards = {}

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        if not self.eval_metrics:
            # from the whole evaluation, not this rank's questions: all ranks must reduce the same metrics
            self.eval_benchmarks = batch.benchmarks
            self.eval_metrics = nn.ModuleList(BenchmarkMetrics(batch.num_samples) for _ in batch.benchmarks)
            self.eval_metrics.to(self.device)
        for group in batch.groups:
            self.eval_rewards[group[0].rollout.prompt.question.id] = [s.verdict.reward for s in group]
        for name, metrics in zip(self.eval_benchmarks, self.eval_metrics, strict=True):
            assert isinstance(metrics, BenchmarkMetrics)
            metrics.update([group for group in batch.groups if group[0].rollout.prompt.question.benchmark == name])

    def on_validation_epoch_end(self) -> None:
        """Log each benchmark and the mean over benchmarks (table 1) under eval/."""
        across = self.share.across
        each = [metrics.compute(across) for metrics in self.eval_metrics if isinstance(metrics, BenchmarkMetrics)]
        logged = dict(each[0])
        if len(each) > 1:
            logged = dict(average_benchmarks(each))
            for name, values in zip(self.eval_benchmarks, each, strict=True):
                logged |= {f"{name}/{metric}": value for metric, value in values.items()}
        self.log_dict({f"eval/{name}": value for name, value in logged.items()}, rank_zero_only=True)
        self.eval_metrics = nn.ModuleList()

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    # --- over ranks ---------------------------------------------------------------------------

    @property
    def share(self) -> Share:
        """This rank's share of each batch."""
        return share_of(self.trainer)

    def reduce(self, tensor: Tensor, op: str) -> Tensor:
        """Reduce over the shares of a batch: what several ranks compute together counts once. Collective."""
        group = self.share.across
        return self.trainer.strategy.reduce(tensor.to(self.device), group, reduce_op=op).cpu()  # pyright: ignore

    def _log(self, prefix: str, values: dict[str, Any]) -> None:
        """Log scalars as PREFIX/NAME; a name with a slash stays as it is."""
        named = {name if "/" in name else f"{prefix}/{name}": float(value) for name, value in values.items()}
        self.log_dict(named, rank_zero_only=True)
