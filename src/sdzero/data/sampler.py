"""Generate calls of fixed composition, journaled and scored."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdzero.data.journal import CallJournal
from sdzero.engines.base import EngineDied, RolloutEngine, TokenChunk
from sdzero.tasks.base import Task
from sdzero.types import Prompt, Rollout, Sampling, ScoredRollout, Verdict
from sdzero.utils.seeds import derive_seed

log = logging.getLogger(__name__)


def score(rollouts: Sequence[Rollout], task: Task) -> list[ScoredRollout]:
    """Verify rollouts; one that was cut at the token limit is `truncated`, whatever it contains."""
    finished = [(r.prompt.question, r.text) for r in rollouts if r.finish_reason == "stop"]
    verdicts = iter(task.verify_all(finished))
    return [
        ScoredRollout(r, next(verdicts) if r.finish_reason == "stop" else Verdict(0, "truncated")) for r in rollouts
    ]


@dataclass
class Sampler:
    """Generates and scores responses.

    Attributes:
        call_size: prompts per generate call; part of the run's identity.
        seed: seed of the run and the stage; each call's seed is derived from it and the call's name.
        weights: checksum of the policy's weights, set after each sync.
        all_reduce_max: maximum of a number over the ranks that share an engine. They make every call together, also
            those that have no prompt left, or have finished the call before a restart.
    """

    engine: RolloutEngine
    task: Task
    journal: CallJournal
    call_size: int
    seed: int
    rank: int = 0
    weights: str = ""
    all_reduce_max: Callable[[int], int] = lambda value: value

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        group: str,
        policy_version: int,
        keep_partial: bool = True,
    ) -> list[ScoredRollout]:
        """Sample one scored response per prompt, in order. `group` names the calls, e.g. "train-000012".

        With `keep_partial`, an engine that `resumes_partial` continues the responses of an interrupted call from their
        tokens so far. (Keeping only finished responses and sampling the others again would favour short ones.)
        """
        scored: list[ScoredRollout] = []
        for rollouts in self.generate(prompts, sampling, group, policy_version, keep_partial):
            scored += score(rollouts, self.task)
        return scored

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, policy_version: int, keep_partial: bool = True
    ) -> Iterator[list[Rollout]]:
        """Yield the responses of each call; as `sample`, without scores."""
        keep = keep_partial and self.engine.resumes_partial
        for call in range(self.all_reduce_max(-(-len(prompts) // self.call_size))):
            mine = prompts[call * self.call_size : (call + 1) * self.call_size]
            yield self._call_together(mine, sampling, group, call, policy_version, keep)

    def from_journal(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, policy_version: int
    ) -> list[Rollout] | None:
        """Return earlier results of `generate`, from the journal alone; None if a call is missing."""
        rollouts: list[Rollout] = []
        for call, first in enumerate(range(0, len(prompts), self.call_size)):
            mine = prompts[first : first + self.call_size]
            key, _, fingerprint = self._identify(mine, sampling, group, call)
            rows = self.journal.get(group, key, fingerprint)
            if rows is None:
                return None
            rollouts += [_decode(prompt, row, policy_version) for prompt, row in zip(mine, rows, strict=True)]
        return rollouts

    def _identify(self, prompts: Sequence[Prompt], sampling: Sampling, group: str, call: int) -> tuple[str, int, str]:
        """Return a call's key in its group, its seed, and the fingerprint of everything that it depends on."""
        seed = derive_seed(self.seed, group, call, self.rank)
        identity = [type(self.engine).__name__, seed, repr(sampling), self.weights, [p.token_ids for p in prompts]]
        return str(call), seed, hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def _call_together(self, *call: Any) -> list[Rollout]:
        """Make a call. Raise EngineDied on all ranks that share an engine if it dies on one: they must make the next
        call together."""
        rollouts: list[Rollout] = []
        fault = None
        try:
            rollouts = self._call(*call)
        except EngineDied as error:
            fault = error
        if self.all_reduce_max(int(fault is not None)):
            raise fault or EngineDied("the engine died in the call of another rank that shares it")
        return rollouts

    def _call(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, call: int, policy_version: int, keep: bool
    ) -> list[Rollout]:
        key, seed, fingerprint = self._identify(prompts, sampling, group, call)
        responses = self.journal.get(group, key, fingerprint)
        missing = self.all_reduce_max(int(responses is None))
        if responses is None or missing:
            partial = self._read_partial(group, fingerprint, responses) if keep else {}
            if num_tokens := sum(len(chunk.token_ids) for chunk in partial.values()):
                log.warning("%s, call %s: continues from %d tokens before an interruption", group, key, num_tokens)
            else:
                self.journal.start(group, key)
            if keep:
                begun = [partial.get(index, TokenChunk()) for index in range(len(prompts))]
                seed = self._seed_of_rest(seed, num_tokens)
                with self.journal.append_partial(group, fingerprint) as on_tokens:
                    rollouts = self.engine.generate(prompts, sampling, seed, policy_version, on_tokens, begun)
            else:
                rollouts = self.engine.generate(prompts, sampling, seed, policy_version)
            responses = [_encode(rollout) for rollout in rollouts]
            self.journal.put(group, key, fingerprint, responses)
        return [_decode(prompt, row, policy_version) for prompt, row in zip(prompts, responses, strict=True)]

    def _read_partial(
        self, group: str, fingerprint: str, responses: list[dict[str, Any]] | None
    ) -> dict[int, TokenChunk]:
        """Return index -> tokens so far: all of them if the call is finished here and only other ranks lack it."""
        if responses is None:
            return self.journal.read_partial(group, fingerprint)
        return {i: TokenChunk(tuple(row["token_ids"]), tuple(row["logprobs"])) for i, row in enumerate(responses)}

    def _seed_of_rest(self, seed: int, num_tokens: int) -> int:
        """Derive a new seed for the rest of a call: the same one would repeat the noise of the tokens before."""
        num_tokens = self.all_reduce_max(num_tokens)
        return derive_seed(seed, "rest", num_tokens) if num_tokens else seed


def _encode(rollout: Rollout) -> dict[str, Any]:
    return {
        "question": rollout.prompt.question.id,
        "token_ids": rollout.token_ids,
        "logprobs": rollout.logprobs,
        "text": rollout.text,
        "finish_reason": rollout.finish_reason,
    }


def _decode(prompt: Prompt, row: dict[str, Any], policy_version: int) -> Rollout:
    return Rollout(
        prompt, tuple(row["token_ids"]), tuple(row["logprobs"]), row["text"], row["finish_reason"], policy_version
    )
