"""Engine without a model that returns given responses, for tests and dry runs of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter

from torch import Tensor

from sdzero.engines.base import EngineSpec, OnTokens, RolloutEngine, SyncReport, TokenChunk, ignore
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Rollout, Sampling


class ScriptedEngine(RolloutEngine):
    """Returns responses from a table or a function, with log-probabilities of 0.

    Args:
        responses: question id -> response text, or a function of the prompt and the call's seed. A response ends with
            an end-of-turn token unless it is cut at `max_new_tokens`.
    """

    def __init__(self, responses: Mapping[str, str] | Callable[[Prompt, int], str]) -> None:
        self.responses = responses
        self.num_generate_calls = 0
        self.num_syncs = 0

    def start(self, spec: EngineSpec, builder: PromptBuilder) -> None:
        self._spec, self._builder = spec, builder
        self.policy_version = 0 if spec.load_weights else None

    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        started = perf_counter()
        for _ in weights:
            pass
        self.num_syncs += 1
        self.policy_version = policy_version
        return SyncReport(perf_counter() - started, checksum=f"scripted-{policy_version}")

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        policy_version: int,
        on_tokens: OnTokens = ignore,
        partials: Sequence[TokenChunk] = (),
    ) -> list[Rollout]:
        self._check_version(policy_version)
        self._check_lengths(prompts, sampling, self._spec.max_model_len)
        self.num_generate_calls += 1
        return [self._respond(prompt, sampling.max_new_tokens, seed) for prompt in prompts]

    def _respond(self, prompt: Prompt, max_new_tokens: int, seed: int) -> Rollout:
        builder = self._builder
        body = builder.tokenizer.encode(self._text(prompt, seed), add_special_tokens=False)
        end = next((index for index, token in enumerate(body) if token in builder.end_ids), len(body))
        ids = [*body[:end], builder.end_id][:max_new_tokens]
        return self._rollout(builder, prompt, ids, [0.0] * len(ids), max_new_tokens)

    def _text(self, prompt: Prompt, seed: int) -> str:
        if callable(self.responses):
            return self.responses(prompt, seed)
        if prompt.question.id not in self.responses:
            raise ValueError(f"responses has no entry for question {prompt.question.id!r}: add one")
        return self.responses[prompt.question.id]
