"""Base class of all methods: one batch is one optimizer step.

A step counts its target tokens over all ranks first, splits its examples into micro batches by token budget (the same
number on every rank), computes each micro batch's loss, which is already divided by the global count, accumulates
gradients, clips, and steps the optimizer and the per-step schedule.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from sdzero.methods.batching import filler_example, micro_batches
from sdzero.methods.policy import Policy
from sdzero.models.language_model import ModelConfig, load, max_positions
from sdzero.models.parallelize import check_parallel, clip_gradients, gradient_sync
from sdzero.types import BUDGET, Example, LossOutput, Reason, RolloutBatch, TraceBatch
from sdzero.utils.files import atomic_write
from sdzero.utils.seeds import run_seed

FAULTS = ("num_nonfinite", "num_skipped")


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule, stepped once per optimizer step.

    Args:
        name: `constant`, `linear` (to 0) or `cosine` (to 0), after the warm-up.
        warmup_steps: steps of linear warm-up.
        warmup_ratio: warm-up as a fraction of all steps; only one of the two may be set.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("schedule: set warmup_steps or warmup_ratio, not both")

    def build(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """Build the torch scheduler for a training of `num_steps` optimizer steps."""
        from transformers import get_scheduler

        name = "constant_with_warmup" if self.name == "constant" else self.name
        warmup = self.warmup_steps or int(self.warmup_ratio * num_steps)
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite in more steps than `max_nonfinite_steps` allows."""


class Method(Policy, ABC):
    """Base class of all methods. A subclass defines `examples`, `loss_denominators` and `loss`.

    Args:
        student: the policy that is trained and sampled from.
        optimizer: optimizer over the student's trainable weights.
        schedule: learning-rate schedule.
        max_grad_norm: norm to which gradients are clipped; 0 disables clipping.
        max_tokens_per_micro_batch: as in Policy.
        reduction: `token_mean` divides by the target tokens of the global batch; `sequence_sum` sums over a
            sequence's tokens and divides by the number of sequences (equations 1, 2 and 4 literally);
            `sequence_mean` averages over a sequence's tokens, then over the sequences (GRPO's paper, SDFT).
        reduce_every_micro_batch: reduce gradients over the ranks after each micro batch, so that FSDP keeps only a
            rank's shard of them. Off, they are reduced once per step, with less communication, and each rank keeps
            all of them in float32 until then. No effect on one rank.
        max_nonfinite_steps: number of steps with a NaN or infinite loss or gradient that are skipped before the run
            stops.
        max_skipped_steps: number of consecutive batches without a target token before the run stops.
    """

    counters = ("policy_version", *BUDGET, *FAULTS)

    def __init__(
        self,
        student: ModelConfig,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(
            p, lr=5e-6, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        ),
        schedule: Schedule = Schedule(),
        max_grad_norm: float = 1.0,
        max_tokens_per_micro_batch: int = 8192,
        reduction: Literal["token_mean", "sequence_sum", "sequence_mean"] = "token_mean",
        reduce_every_micro_batch: bool = False,
        max_nonfinite_steps: int = 0,
        max_skipped_steps: int = 10,
    ) -> None:
        super().__init__(student, max_tokens_per_micro_batch)
        self.automatic_optimization = False
        self.optimizer_callable = optimizer
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.reduction = reduction
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.max_nonfinite_steps = max_nonfinite_steps
        self.max_skipped_steps = max_skipped_steps
        self.num_generations = self.num_tokens_sampled = self.num_tokens_trained = 0
        self.num_nonfinite = self.num_skipped = 0

    # --- defined by a subclass ----------------------------------------------------------------

    @abstractmethod
    def examples(self, batch: Any) -> list[Example]:
        """Return the training sequences of this rank's batch."""

    @abstractmethod
    def loss_denominators(self, examples: Sequence[Example]) -> list[int]:
        """Count what the loss divides by, summed over all ranks before the first micro batch; tokens come first."""

    @abstractmethod
    def loss(self, examples: Sequence[Example], denominators: Sequence[float], precomputed: Any = None) -> LossOutput:
        """Compute a micro batch's contribution to the loss of the step.

        Its metrics are scalars that add up over micro batches and ranks, logged under train/ unless their name has a
        prefix of its own.
        """

    def precompute(self, batches: Sequence[Sequence[Example]]) -> Iterable[Any]:
        """Yield inputs of each micro batch's loss, in order, consumed one micro batch at a time."""
        return repeat(None)

    def token_weights(self, examples: Sequence[Example], denominators: Sequence[float]) -> tuple[Tensor, float]:
        """Return the weight of each target token [N] and the divisor of their weighted sum, by `reduction`.

        Args:
            examples: a micro batch.
            denominators: target tokens and sequences of the step, over all ranks.
        """
        is_mean = self.reduction == "sequence_mean"
        rows = [torch.full((num := len(e.target),), e.weight / num if is_mean else e.weight) for e in examples]
        return torch.cat(rows).to(self.device), denominators[0 if self.reduction == "token_mean" else 1]

    def num_trained(self, examples: Sequence[Example]) -> int:
        """Count the tokens that these examples add to the training budget, as in appendix C.2."""
        return sum(len(e.target) for e in examples)

    @property
    def packed(self) -> bool:
        """True if a micro batch is one row that holds all its sequences."""
        return self.student_config.packs

    # --- set-up -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        precision = str(self.trainer.precision)
        if stage == "fit" and precision not in ("32-true", "64-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision={precision}: 16-bit weights are too coarse for these learning rates. "
                "Use bf16-mixed (bfloat16 computation, float32 weights) or 32-true"
            )
        if stage == "fit" and self.student_config.dtype != "float32":
            if self.student_config.lora is None:
                raise ValueError(
                    "student.dtype: trained weights must be float32; trainer.precision sets the dtype of computation"
                )
            if precision != "bf16-mixed":
                raise ValueError("student.dtype: bfloat16 weights require trainer.precision=bf16-mixed")
        super().setup(stage)

    # --- frozen models beside the student -----------------------------------------------------

    def check_vocabulary(self, key: str, config: ModelConfig) -> None:
        """Restrict `max_positions` to those of another model; raise ValueError if its vocabulary is another."""
        hf_config, vocab_size = config.hf_config(), self.hf_config.vocab_size
        self.max_positions = min(self.max_positions, max_positions(hf_config))
        if hf_config.vocab_size != vocab_size:
            raise ValueError(
                f"{key}.path: its vocabulary has {hf_config.vocab_size} tokens, the student's {vocab_size}"
            )

    def check_frozen(self, config: ModelConfig) -> None:
        """Check another model against the Trainer's strategy, before any weights are read."""
        check_parallel(config, config.hf_config(), self.trainer.strategy, self.share.num_members)

    def load_frozen(self, name: str, config: ModelConfig) -> torch.nn.Module:
        """Load and shard another model, in evaluation mode, to be kept as attribute `name`."""
        model = load(config, run_seed()).requires_grad_(False)
        # DDP must ignore it: every rank has loaded it, and it may be on another device than the student
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._ddp_params_and_buffers_to_ignore = [f"{name}.{tensor}" for tensor, _ in tensors]
        return self.shard(model, config).eval()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_callable([p for p in self.student.parameters() if p.requires_grad])
        scheduler = self.schedule.build(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- training -----------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch | TraceBatch, batch_idx: int) -> None:
        started = time.monotonic()
        if isinstance(batch, RolloutBatch):
            if not 0 <= self.policy_version - batch.policy_version <= batch.max_lag:
                raise RuntimeError(f"off-policy batch: version {batch.policy_version}, student {self.policy_version}")
            self._log("rollout", self._count_rollouts(batch))
        examples = self.examples(batch)
        counts = torch.tensor([*self.loss_denominators(examples), self.num_trained(examples)])
        *denominators, num_trained = self.reduce(counts, "sum").tolist()
        if not denominators[0]:
            return self._skip()
        metrics = self._backward(examples, denominators)
        metrics |= self._step(metrics, examples, denominators)
        self.num_skipped = 0
        self.num_tokens_trained += int(num_trained)
        metrics["tokens_per_second"] = torch.tensor(num_trained / (time.monotonic() - started))
        self._log("train", metrics)
        self._log("budget", {name.removeprefix("num_"): getattr(self, name) for name in BUDGET})

    def _backward(self, examples: list[Example], denominators: list[int]) -> dict[str, Tensor]:
        batches = micro_batches(examples, self.max_tokens_per_micro_batch, self.packed)
        num_batches = int(self.reduce(torch.tensor(len(batches)), "max"))
        batches += [[filler_example(self.builder.pad_id)]] * (num_batches - len(batches))
        totals: dict[str, Tensor] = {}
        for i, (micro_batch, precomputed) in enumerate(zip(batches, self.precompute(batches), strict=False)):
            is_last = i == num_batches - 1
            with gradient_sync(self.student, self.trainer.strategy, is_last, self.reduce_every_micro_batch):
                output = self.loss(micro_batch, denominators, precomputed)
                # strategies average gradients over ranks; the loss is already divided by the global count
                self.manual_backward(output.loss * self.share.num_shares)
            for name, value in {"loss": output.loss, **output.metrics}.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach().float().cpu()
        names = sorted(totals)
        reduced = self.reduce(torch.stack([totals[name] for name in names]), "sum")
        return dict(zip(names, reduced, strict=True))

    def _step(self, metrics: dict[str, Tensor], examples: list[Example], denominators: list[int]) -> dict[str, Tensor]:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        norm = clip_gradients(self.student, self.max_grad_norm or float("inf"), self.share)
        learning_rate = optimizer.param_groups[0]["lr"]
        if bool(torch.isfinite(norm) and torch.isfinite(metrics["loss"])):
            optimizer.step()
            self.lr_schedulers().step()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportCallIssue]
            self.policy_version += 1
        else:
            self._count_nonfinite({**metrics, "grad_norm": norm}, examples, denominators)
        optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": torch.tensor(learning_rate), "nonfinite": torch.tensor(self.num_nonfinite)}

    def _count_nonfinite(self, metrics: dict[str, Tensor], examples: list[Example], denominators: list[int]) -> None:
        """Skip the step, or stop the run and keep the batch. Collective: loss and norm, and so the decision, are equal
        on all ranks.

        `torch.load` of a rank's file gives plain Python values: step, rank, examples (the fields of `Example`), metrics
        (loss, gradient norm and others over all ranks) and denominators (of the loss).
        """
        self.num_nonfinite += 1
        step, rank, values = self.policy_version, self.global_rank, {k: float(v) for k, v in metrics.items()}
        ids = [e.id for e in examples]
        found = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, batch {ids}"
        if self.num_nonfinite <= self.max_nonfinite_steps:
            return self.print(f"skipped {found}")
        kept = {"step": step, "rank": rank, "examples": [asdict(e) for e in examples], "metrics": values}
        folder = Path(self.trainer.default_root_dir) / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / f"step={step}-rank={rank}.pt") as file:
            torch.save({**kept, "denominators": list(denominators)}, file)
        self.trainer.strategy.barrier()  # every rank writes before the first error ends the job
        raise NonFiniteError(
            f"{found}. max_nonfinite_steps={self.max_nonfinite_steps} skips such steps. The batch is kept, one "
            f"file per rank: torch.load('{folder}/step={step}-rank=0.pt')"
        )

    def _skip(self) -> None:
        self.num_skipped += 1
        if self.num_skipped > self.max_skipped_steps:
            raise RuntimeError(f"{self.num_skipped} consecutive batches had no target token: all are empty or left out")
        self._log("train", {"skipped": self.num_skipped})

    def _count_rollouts(self, batch: RolloutBatch) -> dict[str, float]:
        """Add the rollouts of all ranks to the budget; return their means and the statistics of sampling."""
        lengths, verdicts = [len(s.rollout.token_ids) for s in batch.scored], [s.verdict for s in batch.scored]
        sums = [len(lengths), sum(lengths), sum(v.reward for v in verdicts)]
        sums += [sum(v.reason == reason for v in verdicts) for reason in get_args(Reason)]
        num, num_tokens, num_correct, *reasons = self.reduce(torch.tensor(sums), "sum").tolist()
        self.num_generations += num
        self.num_tokens_sampled += num_tokens
        means = {"reward": num_correct / max(num, 1), "length": num_tokens / max(num, 1)}
        means |= {reason: n / max(num, 1) for reason, n in zip(get_args(Reason), reasons, strict=True)}
        return {**means, **batch.stats}
