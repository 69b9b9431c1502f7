"""A rollout engine: its own copy of the policy's weights, and a fast way to sample from them."""

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
    """The engine is dead, late, or holds other weights than it should. Never a reward."""


class EngineDied(EngineError):
    """It died, was late, or returned nothing or something broken: started anew it may do better.

    Any other EngineError means wrong weights, and stops the run.
    """


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is started for.

    Args:
        model_path: model folder or hub id: config and tokenizer always, weights if `load_weights`.
        max_model_len: longest prompt + response in tokens, derived from the recipe's lengths.
        dtype: dtype of the engine's weights, "float32" or "bfloat16".
        load_weights: False where a `sync` follows at once.
    """

    model_path: str
    max_model_len: int
    dtype: str = "float32"
    load_weights: bool = False


@dataclass(frozen=True)
class SyncReport:
    """seconds: wall clock of the sync; checksum: of all weights sent, in the engine's dtype."""

    seconds: float
    checksum: str


@dataclass(frozen=True)
class TokenChunk:
    """Consecutive tokens of a response, and the engine's untempered log-probability of each."""

    token_ids: TokenIds = ()
    logprobs: tuple[float, ...] = ()


OnTokens = Callable[[Mapping[int, TokenChunk]], None]
"""Takes what one step of the engine drew: a prompt's place in the call -> the new tokens of its response."""


def ignore(pieces: Mapping[int, TokenChunk]) -> None:
    """Does nothing with new tokens."""


def is_complete(token_ids: Sequence[int], end_ids: Collection[int], max_new_tokens: int) -> bool:
    """Whether a response is at its end: an end-of-turn token, or the limit."""
    return len(token_ids) == max_new_tokens or (bool(token_ids) and token_ids[-1] in end_ids)


class RolloutEngine(ABC):
    """Life: `start`, then any number of `sync` and `generate`, then `close`; then perhaps `start` again.

    The trainer's Python, numpy and torch random states are the same after each call as before it.
    """

    policy_version: int | None = None
    """Version of the last completed sync (0 after a start with `load_weights`); None: no weights yet."""

    resumes_partial: ClassVar[bool] = False
    """Whether a call that broke off is continued where it stood: an engine that draws token by token, and would not
    repeat the call to the bit anyway. The others ignore `on_tokens` and `partials`."""

    starts_collectively: ClassVar[bool] = False
    """Whether `start` is collective over all ranks: none can start its engine anew while another is in a call."""

    is_remote: ClassVar[bool] = False
    """Whether it samples elsewhere, on nothing that the trainer computes with, and `generate` may run in a thread."""

    @abstractmethod
    def start(self, spec: EngineSpec, builder: PromptBuilder) -> None:
        """Builds the engine.

        Raises:
            ModuleNotFoundError: the engine's library is missing; names the extra that brings it.
        """

    @abstractmethod
    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        """Replaces all weights by Hugging Face (name, full tensor) pairs and forgets cached prefixes.

        Consumes the whole iterator (on every rank in the same order: producing it may gather).

        Raises:
            EngineError: the engine's tensors differ from what was sent.
            EngineDied: the engine died.
        """

    def warm_up(self) -> None:
        """Pays in advance what the first `generate` would take longer than later ones, once weights are there.

        It changes no later draw. Nothing where the first call is like the others.

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
        """One response per prompt, in order. The unit of durability: same call, same seed, same weights.

        Args:
            on_tokens: is handed what is drawn, once per step of the engine and for all responses of that step at once,
                so that what it has seen is always the state of one moment.
            partials: what was drawn of each response before, none or one piece per prompt. Only what follows is drawn,
                and nothing where a response is complete; the result is the whole.

        Raises:
            ValueError: a prompt with its new tokens is longer than the engine's `max_model_len`; nothing is cut.
            EngineError: the engine holds another version.
            EngineDied: it died, passed its deadline, or returned nothing or something broken.
        """

    def sleep(self) -> None:
        """Gives back what memory it can until `wake`; nothing where the platform has no such thing."""

    def wake(self) -> None:
        """Undoes `sleep`. Weights may be gone: a `sync` follows before the next `generate`."""

    def close(self) -> None:
        """Frees everything, whatever state the engine is in: also one that died, or never started."""

    def _check_version(self, policy_version: int) -> None:
        if self.policy_version != policy_version:
            raise EngineError(
                f"asked for responses of policy version {policy_version}, but the engine holds {self.policy_version}"
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
        """A response from what the engine returned, checked: it ends at its first end-of-turn token or at the limit."""
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
    """Python's, numpy's and torch's random states (every CUDA device's too) end as they began.

    Inside, all of them are seeded with `seed`; None leaves them be.
    """
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
