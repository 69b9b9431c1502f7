"""What every method shares: one batch is one optimizer step.

A step counts its target tokens over all ranks first, splits its examples into micro batches by token
budget (the same number on every rank), lets the method compute each micro batch's loss, divides once, clips, steps the
optimizer and the per-step schedule. Evaluation is the same for all methods and lives here too.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

from sdzero.losses import cross_entropy_head
from sdzero.methods.batching import collate, micro_batches
from sdzero.methods.lr_schedule import Schedule
from sdzero.methods.nonfinite import write_post_mortem
from sdzero.methods.policy import Evaluated
from sdzero.models.language_model import ModelConfig, load
from sdzero.models.lora import check_strategy
from sdzero.models.parallelize import average_copies, check_tensor_parallel, clip_grad_norm, shard_fsdp1, shard_fsdp2
from sdzero.models.weights import full_weights
from sdzero.prompts import Context, Revision
from sdzero.trainer.rng_state import gather_rng_states, restore_rng_states
from sdzero.trainer.strategies import Share, share_of
from sdzero.types import BUDGET, Example, LossOutput, Reason, Rollout, RolloutBatch, TokenIds, TraceBatch
from sdzero.utils.seeds import run_seed

FAULTS = ("num_nonfinite", "num_skipped")


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite more often than `max_nonfinite_steps` allows."""


class Method(Evaluated):
    """Base class of SRT and SelfDistill; by itself it only evaluates (`sdzero validate`, `sdzero test`).

    Args:
        student: the policy that is trained and sampled from.
        optimizer: optimizer over the student's trainable weights.
        schedule: learning rate's course.
        max_grad_norm: gradients are clipped to this norm; 0 clips nothing.
        max_tokens_per_micro_batch: rows x longest row of a micro batch, counted on the longer of the student's and
            the teacher's sequence; the sum of the sequences where they are packed (`student.attn_implementation`).
        reduction: `token_mean` divides by the target tokens of the global batch; `sequence_sum` sums
            over a sequence's tokens and divides by the number of sequences (equations 1, 2 and 4 to the letter).
        reduce_every_micro_batch: sum gradients over the ranks after each micro batch, so that FSDP keeps a rank's share
            of them only. Off, they are summed once a step and each rank keeps all of them in float32 until then: the
            less communication of the two, for where there is room. Without effect on one rank.
        max_nonfinite_steps: NaN or infinite steps that are passed over before the run stops.
        max_skipped_steps: consecutive batches without a target token before the run stops.
    """

    def __init__(
        self,
        student: ModelConfig,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(
            p, lr=5e-6, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        ),
        schedule: Schedule = Schedule(),
        max_grad_norm: float = 1.0,
        max_tokens_per_micro_batch: int = 8192,
        reduction: Literal["token_mean", "sequence_sum"] = "token_mean",
        reduce_every_micro_batch: bool = False,
        max_nonfinite_steps: int = 0,
        max_skipped_steps: int = 10,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.student_config: ModelConfig = student
        self.builder = student.builder()
        self.hf_config = student.hf_config()
        self.optimizer_callable = optimizer
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.reduction = reduction
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.max_nonfinite_steps = max_nonfinite_steps
        self.max_skipped_steps = max_skipped_steps
        self.max_positions: int = getattr(self.hf_config, "max_position_embeddings", None) or 2**31
        self.policy_version = 0
        self.num_generations = 0
        self.num_tokens_sampled = 0
        self.num_tokens_trained = 0
        self.num_nonfinite = 0
        self.num_skipped = 0
        self._random_states: list[dict[str, Any]] | None = None  # of a checkpoint, until the first step

    # --- what a method adds -------------------------------------------------------------------

    @abstractmethod
    def examples(self, batch: Any) -> list[Example]:
        """The training sequences of this rank's batch."""
        raise TypeError(f"{type(self).__name__} only evaluates: to train, take a method such as sdzero.methods.SRT")

    @abstractmethod
    def counts(self, examples: Sequence[Example]) -> list[int]:
        """What the loss divides by, summed over all ranks before the first micro batch; the first is the tokens."""

    def prepare(self, batches: Sequence[Sequence[Example]]) -> Iterable[Any]:
        """What the loss of each micro batch needs beforehand, in their order; each is asked for when it is needed."""
        return repeat(None)

    @abstractmethod
    def loss(self, examples: Sequence[Example], counts: Sequence[float], prepared: Any = None) -> LossOutput:
        """The micro batch's share of the loss; its metrics are scalars that add up over micro batches and ranks.

        They are logged under train/ unless their name says otherwise.
        """

    def num_trained(self, examples: Sequence[Example]) -> int:
        """Tokens these examples add to the training budget, counted as appendix C.2 does."""
        return sum(len(e.target) for e in examples)

    @property
    def packed(self) -> bool:
        """Whether a micro batch is one row that holds all its sequences."""
        return self.student_config.packs

    # --- set-up -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        precision = str(self.trainer.precision)
        if stage == "fit" and precision not in ("32-true", "64-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision={precision}: at these learning rates a 16-bit weight never moves. "
                "Use bf16-mixed (bfloat16 computation, float32 weights) or 32-true"
            )
        if stage == "fit" and self.student_config.dtype != "float32":
            if self.student_config.lora is None:
                raise ValueError(
                    "student.dtype: trained weights must be float32; trainer.precision sets the computation"
                )
            if precision != "bf16-mixed":
                raise ValueError("student.dtype: weights in bfloat16 compute in it: set trainer.precision=bf16-mixed")
        check_strategy(self.student_config.lora, self.student_config.dtype, self.trainer.strategy)
        check_tensor_parallel(self.hf_config, self.share.num_members)

    def configure_model(self) -> None:
        if not hasattr(self, "student"):
            self.student = self.shard(load(self.student_config, run_seed()), self.student_config)

    def shard(self, model: nn.Module, config: ModelConfig) -> nn.Module:
        """The model as the Trainer's strategy wants it; FSDP wraps the model here, not the LightningModule."""
        compute_dtype = torch.bfloat16 if "bf16" in str(self.trainer.precision) else None
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            return shard_fsdp2(model, config, self.device_mesh, compute_dtype)  # pyright: ignore
        if isinstance(self.trainer.strategy, FSDPStrategy):
            return shard_fsdp1(model, config, self.trainer.strategy.root_device, compute_dtype)  # pyright: ignore
        return model

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_callable([p for p in self.student.parameters() if p.requires_grad])
        scheduler = self.schedule.build(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sdzero"] = {name: getattr(self, name) for name in ("policy_version", *BUDGET, *FAULTS)}
        checkpoint["random_states"] = gather_rng_states(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["sdzero"].items():
            setattr(self, name, value)
        self._random_states = checkpoint.get("random_states", [])

    def on_train_start(self) -> None:
        if self._random_states is not None:  # not earlier: what comes between loading and the first step draws too
            restore_rng_states(
                self._random_states, self.device, self.global_rank, self.trainer.world_size, self.global_step
            )
            self._random_states = None

    # --- the policy, as the data modules see it -----------------------------------------------

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The student's full weights for the rollout engine. Collective: every rank consumes all of it."""
        return full_weights(self.student)

    @torch.no_grad()
    def policy_logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """The student's untempered log-probabilities of sampled responses, one tensor [N_i] each. Collective.

        One response at a time: the engine is awake, and a pass over several long ones would need its memory.
        """
        blank = self.blank()
        num_passes = int(self.reduce(torch.tensor(max(len(rollouts), 1)), "max"))  # on every rank the same number
        rows = [(r.prompt.token_ids, r.token_ids) for r in rollouts]
        rows += [(blank.context, blank.target)] * (num_passes - len(rows))
        return [self._logprobs(*row) for row in rows][: len(rollouts)]

    def _logprobs(self, context: TokenIds, target: TokenIds) -> Tensor:
        batch = collate([context], [target], self.builder.pad_id).to(self.device)
        ones = torch.ones(len(batch.targets), device=self.device)

        def head(hidden: Tensor, weight: Tensor) -> LossOutput:
            return cross_entropy_head(hidden, weight, batch.targets, ones, len(batch.targets))

        with self.trainer.precision_plugin.forward_context():
            return self.student(batch.input_ids, batch.predicts, head).metrics["logprobs"]

    def reviser(self) -> tuple[Callable[..., Any], Context]:
        """Who judges the tokens of an answer, and what it reads before it: a method without a teacher is its own."""
        return self.student, Revision()

    # --- training -----------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch | TraceBatch, batch_idx: int) -> None:
        started = time.monotonic()
        if isinstance(batch, RolloutBatch) and not 0 <= self.policy_version - batch.policy_version <= batch.max_lag:
            raise RuntimeError(f"off-policy batch: version {batch.policy_version}, student {self.policy_version}")
        if isinstance(batch, RolloutBatch):
            self._log("rollout", self._count_rollouts(batch))
        examples = self.examples(batch)
        counts = self.reduce(torch.tensor([*self.counts(examples), self.num_trained(examples)]), "sum").tolist()
        if not counts[0]:
            return self._skip()
        metrics = self._backward(examples, counts[:-1])
        metrics |= self._step(metrics, examples, counts[:-1])
        self.num_skipped = 0
        self.num_tokens_trained += int(counts[-1])
        metrics["tokens_per_second"] = torch.tensor(counts[-1] / (time.monotonic() - started))
        self._log("train", metrics)
        self._log("budget", {name.removeprefix("num_"): getattr(self, name) for name in BUDGET})

    def _backward(self, examples: list[Example], counts: list[int]) -> dict[str, Tensor]:
        batches = micro_batches(examples, self.max_tokens_per_micro_batch, self.packed)
        num_batches = int(self.reduce(torch.tensor(len(batches)), "max"))
        batches += [[self.blank()]] * (num_batches - len(batches))
        totals: dict[str, Tensor] = {}
        for i, (micro_batch, prepared) in enumerate(zip(batches, self.prepare(batches), strict=False)):
            with self._gradient_sync(last=i == num_batches - 1):
                output = self.loss(micro_batch, counts, prepared)
                # strategies average gradients over ranks; the loss was already divided by the global count
                self.manual_backward(output.loss * self.share.num_shares)
            for name, value in {"loss": output.loss, **output.metrics}.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach().float().cpu()
        names = sorted(totals)
        reduced = self.reduce(torch.stack([totals[name] for name in names]), "sum")
        return dict(zip(names, reduced, strict=True))

    def _step(self, metrics: dict[str, Tensor], examples: list[Example], counts: list[int]) -> dict[str, Tensor]:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        norm = self._clip()
        finite = bool(torch.isfinite(norm) and torch.isfinite(metrics["loss"]))
        learning_rate = optimizer.param_groups[0]["lr"]
        if finite:
            optimizer.step()
            self.lr_schedulers().step()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportCallIssue]
            self.policy_version += 1
        else:
            self._count_nonfinite({**metrics, "grad_norm": norm}, examples, counts)
        optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": torch.tensor(learning_rate), "nonfinite": torch.tensor(self.num_nonfinite)}

    def _count_nonfinite(self, metrics: dict[str, Tensor], examples: list[Example], counts: list[int]) -> None:
        """Collective: loss and norm are those of all ranks, so all of them pass the step over, or stop."""
        self.num_nonfinite += 1
        figures, ids = {name: float(value) for name, value in metrics.items()}, [e.id for e in examples]
        what = f"step {self.policy_version}: loss {figures['loss']}, gradient norm {figures['grad_norm']}, batch {ids}"
        if self.num_nonfinite > self.max_nonfinite_steps:
            folder = Path(self.trainer.default_root_dir) / "nonfinite"
            write_post_mortem(folder, self.policy_version, self.trainer.global_rank, examples, figures, counts)
            self.trainer.strategy.barrier()  # a rank that raises takes the others with it
            raise NonFiniteError(
                f"{what}. max_nonfinite_steps={self.max_nonfinite_steps} lets such steps pass. The batch is kept, a "
                f"file a rank: torch.load('{folder}/step={self.policy_version}-rank=0.pt')"
            )
        self.print(f"passed over {what}")

    def _clip(self) -> Tensor:
        max_norm = self.max_grad_norm or float("inf")
        if isinstance(self.student, FSDP1):
            return self.student.clip_grad_norm_(max_norm).cpu()
        parameters = [*self.student.parameters()]
        if (members := self.share.within) is not None:
            average_copies(parameters, members)
        return clip_grad_norm(parameters, max_norm).detach().cpu()

    def _skip(self) -> None:
        self.num_skipped += 1
        if self.num_skipped > self.max_skipped_steps:
            raise RuntimeError(f"{self.num_skipped} batches in a row had no target token: all are empty or left out")
        self._log("train", {"skipped": self.num_skipped})

    def _count_rollouts(self, batch: RolloutBatch) -> dict[str, float]:
        """Adds the step's rollouts, of all ranks, to the budget; returns their means and the sampling's figures."""
        lengths, verdicts = [len(s.rollout.token_ids) for s in batch.scored], [s.verdict for s in batch.scored]
        sums = [len(lengths), sum(lengths), sum(v.reward for v in verdicts)]
        sums += [sum(v.reason == reason for v in verdicts) for reason in get_args(Reason)]
        num, num_tokens, num_right, *reasons = self.reduce(torch.tensor(sums), "sum").tolist()
        self.num_generations += num
        self.num_tokens_sampled += num_tokens
        means = {"reward": num_right / max(num, 1), "length": num_tokens / max(num, 1)}
        means |= {reason: n / max(num, 1) for reason, n in zip(get_args(Reason), reasons, strict=True)}
        return {**means, **batch.stats}

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are reduced over ranks in a step's last backward pass only, unless they are to be in each."""
        reduces = last or self.reduce_every_micro_batch
        if isinstance(self.student, FSDPModule):
            self.student.set_requires_gradient_sync(reduces)
            # embedding and head, which the forward pass leaves gathered, wait so for the next micro batch
            self.student.set_reshard_after_backward(last, recurse=False)
        elif isinstance(self.student, FSDP1) and not reduces:
            return self.student.no_sync()
        elif isinstance(self.trainer.strategy, DDPStrategy) and not reduces:
            return self.trainer.strategy.block_backward_sync()
        return nullcontext()

    def blank(self) -> Example:
        """A row that costs next to nothing and weighs nothing, for ranks that have run out of rows."""
        pad = (self.builder.pad_id,)
        return Example("", pad, pad, teacher_context=pad, weight=0.0, logprobs=(0.0,))

    @property
    def share(self) -> Share:
        """Which share of each batch is this rank's."""
        return share_of(self.trainer)

    def reduce(self, tensor: Tensor, op: str) -> Tensor:
        """Over the shares of a batch: what several ranks work out together counts once. Collective."""
        group = self.share.across
        return self.trainer.strategy.reduce(tensor.to(self.device), group, reduce_op=op).cpu()  # pyright: ignore

    def _log(self, prefix: str, values: dict[str, Any]) -> None:
        named = {name if "/" in name else f"{prefix}/{name}": float(value) for name, value in values.items()}
        self.log_dict(named, rank_zero_only=True)
