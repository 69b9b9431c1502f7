"""Scripted engines, samplers and killed calls for tests of the journal."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sdzero.data.journal import CallJournal
from sdzero.data.sampler import Sampler
from sdzero.engines import ScriptedEngine
from sdzero.engines.base import EngineSpec, OnTokens, RolloutEngine, TokenChunk, ignore, is_complete
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Rollout, Sampling, ScoredRollout
from sdzero.utils.row_checksum import verify_checksum
from support.helpers import Toy

SAMPLING = Sampling(max_new_tokens=8)
END = 0.3  # with it a response has 3.1 tokens, and in 8 of 100 cases 8 that are cut


class Seeds(ScriptedEngine):
    """Answers with the call's seed; records each call's seed and questions."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, seed: str(seed)[:5])
        self.calls: list[tuple[int, list[str]]] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, *rest: Any, **more: Any
    ) -> list[Rollout]:
        self.calls.append((seed, [prompt.question.id for prompt in prompts]))
        return super().generate(prompts, sampling, seed, *rest, **more)


class Killed(BaseException):
    """A kill: no code catches it."""


class Stepping(ScriptedEngine):
    """Samples one token of all responses of a call a step, as vLLM does, and is killed after `lives` steps.

    Each token is the last one with a probability of `END`; its log-probability follows from its id.
    """

    resumes_partial = True

    def __init__(self, lives: int = 1000) -> None:
        super().__init__({})
        self.lives = lives
        self.calls: list[tuple[int, list[str]]] = []  # each call's seed, and the questions it sampled tokens for
        self.num_sampled = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        policy_version: int,
        on_tokens: OnTokens = ignore,
        partials: Sequence[TokenChunk] = (),
    ) -> list[Rollout]:
        limit, noise, end_ids = sampling.max_new_tokens, random.Random(seed), self._builder.end_ids
        ids = [list(piece.token_ids) for piece in partials] or [[] for _ in prompts]
        values = [list(piece.logprobs) for piece in partials] or [[] for _ in prompts]
        running = [index for index, row in enumerate(ids) if not is_complete(row, end_ids, limit)]
        self.calls.append((seed, [prompts[index].question.id for index in running]))
        while running:
            if self.lives == 0:
                raise Killed
            self.lives -= 1
            tokens = [self._builder.end_id if noise.random() < END else noise.randrange(10, 90) for _ in running]
            step = {index: TokenChunk((token,), (-token / 7,)) for index, token in zip(running, tokens, strict=True)}
            for index, piece in step.items():
                ids[index] += piece.token_ids
                values[index] += piece.logprobs
            self.num_sampled += len(step)
            on_tokens(step)
            running = [index for index in running if not is_complete(ids[index], end_ids, limit)]
        return [self._rollout(self._builder, *response, limit) for response in zip(prompts, ids, values, strict=True)]


class ByBatches(Stepping):
    """Repeats an interrupted call, as the transformers engine does."""

    resumes_partial = False


def sampler(
    builder: PromptBuilder,
    folder: Path,
    call_size: int = 2,
    rank: int = 0,
    seed: int = 7,
    engine: RolloutEngine | None = None,
) -> Sampler:
    engine = engine or Seeds()
    engine.start(EngineSpec("", 512, load_weights=True), builder)
    return Sampler(engine, Toy(), CallJournal(folder), call_size, seed, rank, weights="w")


def prompts(builder: PromptBuilder, num: int = 5) -> list[Prompt]:
    return [builder.prompt(question) for question in Toy().questions("phase1", num)]


def calls(sampler: Sampler) -> list[tuple[int, list[str]]]:
    assert isinstance(sampler.engine, Seeds | Stepping)
    return sampler.engine.calls


def sample_changed(builder: PromptBuilder, folder: Path, change: str, engine: RolloutEngine) -> list[ScoredRollout]:
    """Sample the call of six prompts of seed 7 and group "g" with one part of its identity changed."""
    again = sampler(builder, folder, 6, seed=8 if change == "seed" else 7, engine=engine)
    again.weights = "other" if change == "weights" else "w"
    asked = prompts(builder, 6)[::-1] if change == "prompts" else prompts(builder, 6)
    sampling = Sampling(0.5, 1.0, 8) if change == "sampling" else SAMPLING
    return again.sample(asked, sampling, "h" if change == "group" else "g", 0)


CHANGES = ["sampling", "weights", "prompts", "seed", "group", "engine"]


def killed(builder: PromptBuilder, folder: Path, engine: Stepping, num: int = 6, **options: Any) -> None:
    """Sample `num` prompts in one call that is killed."""
    with pytest.raises(Killed):
        sampler(builder, folder, num, engine=engine).sample(prompts(builder, num), SAMPLING, "g", 0, **options)


def partial(folder: Path) -> dict[int, list[int]]:
    """Return index -> tokens in `g.partial`, from its whole lines."""
    sampled: dict[int, list[int]] = {}
    lines = (folder / "g.partial").read_bytes().split(b"\n")[1:-1]
    for step in (verify_checksum(json.loads(line)) for line in lines):
        for index, (token_ids, logprobs) in step.items():
            assert logprobs == [-token / 7 for token in token_ids]
            sampled.setdefault(int(index), []).extend(token_ids)
    return sampled
