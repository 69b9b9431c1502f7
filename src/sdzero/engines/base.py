"""A rollout engine: its own copy of the policy's weights, and a fast way to sample from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Rollout, Sampling


class EngineError(RuntimeError):
    """The engine is dead, late, or holds other weights than it should. Never a reward."""


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
    """seconds: wall clock of the sync; checksum: of the tensors compared on both sides."""

    seconds: float
    checksum: str


class RolloutEngine(ABC):
    """Life: `start`, then any number of `sync` and `generate`, then `close`.

    The trainer's Python, numpy and torch random states are the same after each call as before it.
    """

    policy_version: int | None = None
    """Version of the last completed sync (0 after a start with `load_weights`); None: no weights yet."""

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
        """

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, policy_version: int
    ) -> list[Rollout]:
        """One response per prompt, in order. The unit of durability: same call, same seed, same weights.

        Raises:
            EngineError: the engine holds another version, died, or passed its deadline.
        """

    def sleep(self) -> None:
        """Gives back what memory it can until `wake`; nothing where the platform has no such thing."""

    def wake(self) -> None:
        """Undoes `sleep`. Weights may be gone: a `sync` follows before the next `generate`."""

    def close(self) -> None:
        """Frees everything. The engine cannot be used again."""

    def _check_version(self, policy_version: int) -> None:
        if self.policy_version != policy_version:
            raise EngineError(
                f"asked for responses of policy version {policy_version}, but the engine holds {self.policy_version}"
            )


