"""Base class of rollout engines, which hold their own copy of the policy's weights and sample from it."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Rollout, Sampling, TokenIds


class EngineError(RuntimeError):
    """The engine failed, timed out, or holds the wrong weights. Never a reward."""


class EngineDied(EngineError):
    """The engine crashed, timed out or returned garbage; a restart may help.

    Any other EngineError means wrong weights and stops the run.
    """


@dataclass(frozen=True)
class EngineSpec:
    """Settings with which an engine is started.

    Args:
        model_path: model folder or hub id: config and tokenizer always, weights if `load_weights`.
        max_model_len: longest prompt + response in tokens, derived from the recipe's lengths.
        dtype: dtype of the engine's weights, "float32" or "bfloat16".
        load_weights: False if a `sync` follows immediately.
    """

    model_path: str
    max_model_len: int
    dtype: str = "float32"
    load_weights: bool = False


@dataclass(frozen=True)
class SyncReport:
    """Result of a weight sync. seconds: wall-clock time; checksum: of all weights sent, in the engine's dtype."""

    seconds: float
    checksum: str


@dataclass(frozen=True)
class TokenChunk:
    """Consecutive tokens of a response, with the engine's untempered log-probability of each."""

    token_ids: TokenIds = ()
    logprobs: tuple[float, ...] = ()


OnTokens = Callable[[Mapping[int, TokenChunk]], None]
"""Callback for each engine step: index of a prompt in the call -> new tokens of its response."""


def ignore(pieces: Mapping[int, TokenChunk]) -> None:
    """Ignore new tokens."""


def is_complete(token_ids: Sequence[int], end_ids: Collection[int], max_new_tokens: int) -> bool:
    """Return whether a response has ended: by an end-of-turn token or at the limit."""
    return len(token_ids) == max_new_tokens or (bool(token_ids) and token_ids[-1] in end_ids)


class RolloutEngine(ABC):
    """Samples responses from a policy whose weights it is sent.

    Lifecycle: `start`, then any number of `sync` and `generate`, then `close`; possibly `start` again. No call changes
    the trainer's RNG states of Python, numpy and torch.
    """

    policy_version: int | None = None
    """Version of the last completed sync, 0 after a start with `load_weights`; None: no weights yet."""

    resumes_partial: ClassVar[bool] = False
    """True if an interrupted call resumes from its partial responses, which suits an engine that could not repeat the
    call bit for bit. The others ignore `on_tokens` and `partials`."""

    starts_collectively: ClassVar[bool] = False
    """True if `start` is collective: no rank can restart its engine while another is in a call."""

    is_remote: ClassVar[bool] = False
    """True if it samples on hardware that the trainer does not use, so that `generate` may run in a thread."""

    @abstractmethod
    def start(self, spec: EngineSpec, builder: PromptBuilder) -> None:
        """Start the engine.

        Raises:
            ModuleNotFoundError: the engine's library is missing; names the extra that installs it.
        """

    @abstractmethod
    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        """Replace all weights by Hugging Face (name, full tensor) pairs and clear the prefix cache.

        Consumes the whole iterator, on every rank in the same order: producing it may be collective.

        Raises:
            EngineError: the engine's tensors differ from what was sent.
            EngineDied: the engine died.
        """

    def warm_up(self) -> None:
        """Do the one-time work of the first `generate`, such as compilation; needs weights, changes no later sample.

        Raises:
            EngineDied: the engine died.
        """

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        policy_version: int,
        on_tokens: OnTokens = ignore,
        partials: Sequence[TokenChunk] = (),
    ) -> list[Rollout]:
        """Sample one response per prompt, in order. The unit of durability: same call, same seed, same weights.

        Args:
            on_tokens: called once per engine step with the new tokens of all its responses, so that the tokens received
                are always a consistent state.
            partials: beginning of each response from an earlier attempt, none or one per prompt. Only the rest is
                sampled, nothing for a complete response; the rollouts contain both parts.

        Raises:
            ValueError: prompt and new tokens exceed the engine's `max_model_len`; nothing is truncated.
            EngineError: the engine holds another policy version.
            EngineDied: it crashed, passed its deadline or returned garbage.
        """

    def sleep(self) -> None:
        """Release memory until `wake`, on platforms that support it."""

    def wake(self) -> None:
        """Undo `sleep`. Weights may be lost: a `sync` must precede the next `generate`."""

    def close(self) -> None:
        """Free all resources in any state, also of an engine that crashed or never started."""

    def _check_version(self, policy_version: int) -> None:
        if self.policy_version != policy_version:
            raise EngineError(
                f"responses of policy version {policy_version} requested, but the engine holds {self.policy_version}"
            )

    @staticmethod
    def _check_lengths(prompts: Sequence[Prompt], sampling: Sampling, max_model_len: int) -> None:
        for prompt in prompts:
            length, new = len(prompt.token_ids), sampling.max_new_tokens
            if length == 0:
                raise ValueError(f"the prompt of question {prompt.question.id!r} is empty")
            if length > max_model_len - 1:
                raise ValueError(
                    f"the prompt of question {prompt.question.id!r} has {length} tokens and leaves no room for a "
                    f"response in max_model_len {max_model_len}: drop the question, or raise the length limits"
                )
            if length + new > max_model_len:
                raise ValueError(
                    f"question {prompt.question.id!r}: {length} prompt tokens + max_new_tokens {new} exceed "
                    f"max_model_len {max_model_len}: lower max_new_tokens, or raise max_model_len"
                )

    def _rollout(
        self,
        builder: PromptBuilder,
        prompt: Prompt,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        max_new_tokens: int,
    ) -> Rollout:
        """Check an engine's output, which must end at its first end-of-turn token or at the limit, and wrap it."""
        ended = bool(token_ids) and token_ids[-1] in builder.end_ids
        body = builder.body(token_ids)
        complete = is_complete(token_ids, builder.end_ids, max_new_tokens)
        if not complete or len(body) != len(token_ids) - ended or len(logprobs) != len(token_ids):
            raise EngineDied(
                f"the engine returned a broken response to question {prompt.question.id!r}: {len(token_ids)} tokens of "
                f"at most {max_new_tokens}, {len(logprobs)} log-probabilities, end-of-turn token last: {ended}"
            )
        assert self.policy_version is not None
        return Rollout(
            prompt=prompt,
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            text=builder.tokenizer.decode(body, skip_special_tokens=True),
            finish_reason="stop" if ended else "length",
            policy_version=self.policy_version,
        )


@contextmanager
def preserve_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the RNG states of Python, numpy and torch (including CUDA) after the block; seed them within it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
