"""Helpers for tests of methods and callbacks: a task, a recording engine, stored batches, a trainer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.utils.data import DataLoader

from sdzero.data.base import stream_loader
from sdzero.engines import ScriptedEngine, TransformersEngine
from sdzero.engines.base import SyncReport
from sdzero.methods import Method
from sdzero.prompts import PromptBuilder
from sdzero.tasks.base import Task
from sdzero.types import Prompt, Question, Rollout, RolloutBatch, Sampling, ScoredRollout, Split, Trace, Verdict


class Toy(Task):
    """Questions "0+1=", "1+1=", ...; by default a response that ends with the gold answer is correct."""

    def __init__(self, right: Callable[[Question, str], bool] = lambda q, text: text.endswith(q.answer)) -> None:
        self.right = right

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        if num_questions is None:
            raise ValueError("toy questions have no end")
        return [Question(f"{split}-{i}", f"{i}+1=", str(i + 1)) for i in range(num_questions)]

    def verify(self, question: Question, response: str) -> Verdict:
        return Verdict(1, "correct") if self.right(question, response) else Verdict(0, "wrong")


class Notes(ScriptedEngine):
    """Scripted engine that records the weights it received, and the prompts and version of every call."""

    def __init__(self, responses: Callable[[Prompt, int], str]) -> None:
        super().__init__(responses)
        self.weights: dict[str, Tensor] = {}
        self.calls: list[tuple[int, list[Prompt]]] = []

    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        self.weights = {name: tensor.clone() for name, tensor in weights}
        return super().sync(self.weights.items(), policy_version)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, policy_version: int, *rest: Any, **more: Any
    ) -> list[Rollout]:
        self.calls.append((policy_version, list(prompts)))
        return super().generate(prompts, sampling, seed, policy_version, *rest, **more)


class Stored(L.LightningDataModule):
    """Precomputed batches, one optimizer step each, the same ones every epoch."""

    def __init__(self, batches: Sequence[Any]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        return stream_loader(len(self.batches), lambda: iter(self.batches))


class Steps(L.Callback):
    """Records, for every step, the gradients seen by the optimizer and all metrics after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module.student, torch.nn.Module)
        named = pl_module.student.hf.named_parameters()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def curve(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self.metrics]


class RecordStudent(L.Callback):
    """Records, when each step begins, the student's weights and the versions of the batch and of the student."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.versions: list[tuple[int, int]] = []
        self.started = [threading.Event() for _ in range(10)]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Method)
        self.started[len(self.weights)].set()
        self.weights.append(weights_of(pl_module.student.hf))  # pyright: ignore[reportArgumentType]
        self.versions.append((batch.policy_version, pl_module.policy_version))


class StaleEngine(TransformersEngine):
    """Claims to hold new weights, and samples from those of the first sync."""

    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        if policy_version == 0:
            return super().sync(weights, 0)
        deque(weights, 0)
        self.policy_version = policy_version
        return SyncReport(0.0, str(policy_version))


class Curves(DummyLogger):
    """Return the logged metrics by step."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.points.setdefault(step, {}).update(metrics)


def make_trainer(root: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False, "log_every_n_steps": 1, "logger": False}
    defaults |= {"devices": 1, "use_distributed_sampler": False}
    return L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**defaults, **options},
    )


def fit(
    method: Method, data: L.LightningDataModule | Sequence[Any], root: Path, *callbacks: L.Callback, **options: Any
) -> Steps:
    """Run a real fit on stored batches or a data module; return the recorded steps."""
    steps = Steps()
    module = data if isinstance(data, L.LightningDataModule) else Stored(data)
    make_trainer(root, *callbacks, steps, **options).fit(method, datamodule=module)
    return steps


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether two sets of tensors are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_trace(builder: PromptBuilder, question_id: str, init: str | None, revised: str, reward: int | None) -> Trace:
    """Build a trace of a first attempt and its revision; without `init`, a demonstration."""
    question = Question(question_id, f"{question_id}: what is 1+1?", "2")
    if init is None:
        return builder.demonstration(question, revised)
    assert reward is not None
    first = make_scored(builder, question, init, reward)
    return builder.trace(first, encode(builder, revised))


def make_scored(
    builder: PromptBuilder, question: Question, response: str, reward: int, cut: bool = False
) -> ScoredRollout:
    """Build a scored response; a `cut` one has no end-of-turn token."""
    ids = encode(builder, response) + (() if cut else (builder.end_id,))
    rollout = Rollout(builder.prompt(question), ids, (0.0,) * len(ids), response, "length" if cut else "stop", 0)
    reason = "truncated" if cut else "correct" if reward else "wrong"
    return ScoredRollout(rollout, Verdict(1, reason) if reward else Verdict(0, reason))


def make_batch(scored: Sequence[ScoredRollout], version: int = 0) -> RolloutBatch:
    return RolloutBatch(list(scored), version, version)


def encode(builder: PromptBuilder, text: str) -> tuple[int, ...]:
    return tuple(builder.tokenizer.encode(text, add_special_tokens=False))


def plain_model(path: Path) -> Any:
    """Load the model with transformers in float64: the slow reference."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def plain_logprobs(model: Any, context: Sequence[int], target: Sequence[int]) -> Tensor:
    """Compute log-probabilities [N, V] at every token of `target` after `context`, in one plain forward pass."""
    logits = model(torch.tensor([[*context, *target]])).logits[0]
    return logits[len(context) - 1 : -1].log_softmax(-1)


def read_by_hand(builder: PromptBuilder, scored: ScoredRollout) -> tuple[int, ...]:
    """Return the context of equation 4's teacher before the second copy of y."""
    body = tuple(i for i in scored.rollout.token_ids if i != builder.end_id)
    phrase = (
        "Let me rephrase the above solution."
        if scored.verdict.reward
        else ("Wait, this response is not correct, let me start over.")
    )
    return scored.rollout.prompt.token_ids + body + encode(builder, f"\n\n{phrase}\n\n")
