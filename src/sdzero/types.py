"""The carriers of one item on its way from question to loss. Imports neither sdzero nor torch.

Shape legend of the whole project: B batch, T tokens of a padded row, N target tokens, V vocabulary,
K top-k, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from torch import Tensor

TokenIds = tuple[int, ...]
Split = Literal["phase1", "phase2", "eval"]
FinishReason = Literal["stop", "length"]
Reason = Literal[
    "correct",
    "wrong",
    "unparseable",
    "truncated",
    "timeout",
    "memory",
    "runtime_error",
    "compile_error",
    "output_limit",
]
BUDGET = ("num_generations", "num_tokens_sampled", "num_tokens_trained")
"""Counters of the computation that a training has used."""


def benchmark_of(question_id: str) -> str:
    """Return the part of a question's id before the first slash; empty without one."""
    name, slash, _ = question_id.partition("/")
    return name if slash else ""


@dataclass(frozen=True)
class Question:
    """A question `x` with its gold answer `a`; `meta` holds what only the task understands.

    An id begins with the name of its task or benchmark and a slash, by which metrics are grouped.

    Questions of one `family` are the same in other words or another language: a split has all of them or none. Empty:
    the question has no family.
    """

    id: str
    text: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""

    @property
    def identity(self) -> str:
        """Key that two splits must not share."""
        return self.family or self.id

    @property
    def benchmark(self) -> str:
        """Benchmark whose metrics the question counts for."""
        return benchmark_of(self.id)


@dataclass(frozen=True)
class Prompt:
    """Token ids that the engine continues: the question's prompt, or that prompt + body(y) + bridge(r)."""

    question: Question
    token_ids: TokenIds


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Args:
        temperature: divisor of the logits; 0 always takes the likeliest token.
        top_p: probability of the smallest set of likeliest tokens to sample from; 1 samples from all.
        max_new_tokens: maximum number of tokens of a response, with its end-of-turn token; a longer one is truncated
            and counts as wrong.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Rollout:
    """A response `y`. `token_ids` are the sampled ids with the end-of-turn token where one was sampled;
    `logprobs` are the engine's untempered log-probabilities of those ids, in nats."""

    prompt: Prompt
    token_ids: TokenIds
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True)
class Verdict:
    """A verifier's binary reward, its reason, and the parsed answer (None: nothing to parse)."""

    reward: Literal[0, 1]
    reason: Reason
    parsed: str | None = None


@dataclass(frozen=True)
class ScoredRollout:
    rollout: Rollout
    verdict: Verdict


@dataclass(frozen=True)
class TeacherContext:
    """Token ids that the teacher reads before the copy of `y` that it scores."""

    token_ids: TokenIds


@dataclass(frozen=True)
class Trace:
    """A row of D_revision. Ids as sampled: prompt | body(y_init) | bridge(r) | body(y_revised) + end-of-turn.

    A trace without `y_init` (`reward` None, `init_ids` and `bridge_ids` empty) is a demonstration; it has the
    generation term only (SFT, RFT).
    """

    question: Question
    prompt_ids: TokenIds
    init_ids: TokenIds
    bridge_ids: TokenIds
    revised_ids: TokenIds
    reward: int | None


@dataclass(frozen=True)
class Example:
    """One training sequence: context | target, and the teacher's context.

    `num_init` is the index in `target` where y_revised starts; `advantage` is that of a policy gradient; `weight` is 0
    for a filler row; `logprobs` are the engine's log-probabilities of a sampled target.
    """

    id: str
    context: TokenIds
    target: TokenIds
    teacher_context: TokenIds = ()
    num_init: int = 0
    reward: int | None = None
    advantage: float = 0.0
    weight: float = 1.0
    logprobs: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        return max(len(self.context), len(self.teacher_context)) + len(self.target)


class _HostBatch:
    """Batch of plain ids: the method moves tensors to the device after it has collated them."""

    def to(self, *_: Any, **__: Any) -> Self:
        return self


@dataclass
class RolloutBatch(_HostBatch):
    """All rollouts of one optimizer step that are a rank's share.

    `sampling` has the parameters by which they were sampled, `stats` statistics to be logged; `max_lag` is the maximum
    number of versions the student may be ahead of `policy_version`.
    """

    scored: list[ScoredRollout]
    policy_version: int
    counter: int
    stats: dict[str, float] = field(default_factory=dict)
    max_lag: int = 0
    sampling: Sampling = Sampling()


@dataclass
class TraceBatch(_HostBatch):
    """All traces of one optimizer step that are a rank's share."""

    traces: list[Trace]
    counter: int


@dataclass
class EvalBatch(_HostBatch):
    """One generate call of an evaluation: `groups[i]` are the k = `num_samples` scored responses of one question.

    `benchmarks` names all benchmarks of the evaluation, also those without a question in this call. `revised` are pairs
    (a response of `groups`, one revision of it); `num_unrevised` counts the responses whose revision would not have
    fitted the model.
    """

    groups: list[list[ScoredRollout]]
    policy_version: int
    counter: int
    num_samples: int
    benchmarks: tuple[str, ...]
    revised: list[tuple[ScoredRollout, ScoredRollout]] = field(default_factory=list)
    num_unrevised: int = 0

    @property
    def scored(self) -> list[ScoredRollout]:
        return [scored for group in self.groups for scored in group]


@dataclass
class LossOutput:
    """A scalar loss for the backward pass, and detached per-token values, each of shape [N]."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
