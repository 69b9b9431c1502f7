"""Sampling of an evaluation: k responses to each held-out question, and revisions of some."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

from sdzero.data.policy_sampler import Policy, Sampled
from sdzero.trainer.shares import Share
from sdzero.types import EvalBatch, Prompt, Question, Sampling, Split


def check_positive(**values: int) -> None:
    """Check keys of `data:`.

    Raises:
        ValueError: a value is below 1; names its key.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"data.{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Evaluation:
    """Questions and sampling of validation and test.

    Args:
        split: split of the task.
        num_questions: number of held-out questions; null takes the whole split, 0 disables evaluation.
        num_samples: k responses per question (avg@k, pass@k).
        sampling: sampling parameters.
        call_size: responses per generate call; part of the run's identity.
        num_revised: number of a question's k responses that are revised once, given their reward
            (Generate-then-Revise).
    """

    split: Split = "eval"
    num_questions: int | None = 0
    num_samples: int = 8
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, max_new_tokens=32768))
    call_size: int = 512
    num_revised: int = 0

    @property
    def is_enabled(self) -> bool:
        """True if there is anything to sample."""
        return self.num_questions != 0

    def __post_init__(self) -> None:
        check_positive(**{"evaluation.num_samples": self.num_samples, "evaluation.call_size": self.call_size})
        if self.num_questions is not None and self.num_questions < 0:
            raise ValueError(f"data.evaluation.num_questions must be at least 0, or null, got {self.num_questions}")
        if not 0 <= self.num_revised <= self.num_samples:
            raise ValueError(
                f"data.evaluation.num_revised must lie in 0..num_samples ({self.num_samples}), got {self.num_revised}"
            )


@dataclass(frozen=True)
class EvalStream:
    """Batches of an evaluation for one share of the data, one generate call each.

    Attributes:
        questions: questions of the whole evaluation, dealt out to the shares in turn.
        policy: the policy that answers.
        sample: (prompts, sampling, group of calls, responses per call) -> scored responses. Collective.
        max_length: the engine's limit for prompt and response in tokens.
    """

    evaluation: Evaluation
    questions: Sequence[Question]
    policy: Policy
    sample: Callable[[Sequence[Prompt], Sampling, str, int], Sampled]
    max_length: int
    share: Share

    @property
    def per_call(self) -> int:
        """Number of questions of one call."""
        return max(1, self.evaluation.call_size // self.evaluation.num_samples)

    def __len__(self) -> int:
        # the same on every rank, so that none waits for another in a collective
        return math.ceil(math.ceil(len(self.questions) / self.share.num_shares) / self.per_call)

    def __iter__(self) -> Iterator[EvalBatch]:
        mine, k = self.questions[self.share.index :: self.share.num_shares], self.evaluation.num_samples
        benchmarks = tuple(dict.fromkeys(question.benchmark for question in self.questions))
        for call in range(len(self)):
            chosen = mine[call * self.per_call : (call + 1) * self.per_call]
            prompts = [self.policy.builder.prompt(q) for q in chosen for _ in range(k)]
            group = f"eval-{self.policy.policy_version:06d}-{call:05d}"
            scored, _ = self.sample(prompts, self.evaluation.sampling, group, self.per_call * k)
            groups = [scored[i * k : (i + 1) * k] for i in range(len(chosen))]
            batch = EvalBatch(groups, self.policy.policy_version, call, k, benchmarks)
            if self.evaluation.num_revised:
                self._revise(batch)
            yield batch

    def _revise(self, batch: EvalBatch) -> None:
        """Sample one revision of the first responses to each question, from the prompt of collection. Collective."""
        sampling = self.evaluation.sampling
        firsts = [scored for group in batch.groups for scored in group[: self.evaluation.num_revised]]
        prompts = [self.policy.builder.revision_prompt(first) for first in firsts]
        fits = [len(prompt.token_ids) + sampling.max_new_tokens <= self.max_length for prompt in prompts]
        group = f"revise-{batch.policy_version:06d}-{batch.counter:05d}"
        revised, _ = self.sample(list(compress(prompts, fits)), sampling, group, self.evaluation.call_size)
        batch.revised = list(zip(compress(firsts, fits), revised, strict=True))
        batch.num_unrevised = fits.count(False)
