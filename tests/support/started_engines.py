"""Rollout engines started once per test module, and references for their samples."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdzero.engines import RemoteVLLMEngine, ScriptedEngine, TransformersEngine, VLLMEngine
from sdzero.engines.base import EngineSpec, RolloutEngine, TokenChunk
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Rollout
from support.vllm_server import MAX_MODEL_LEN

NAMES = ("scripted", "transformers", "vllm", "remote")
SAMPLERS = NAMES[1:]
"""The engines that sample from weights."""


def script(prompt: Prompt, seed: int) -> str:
    return "answer " * (seed % 3 + len(prompt.question.id))


def make_engine(name: str, url: str = "") -> RolloutEngine:
    """Construct an engine; `url` is the server of the remote one."""
    if name == "scripted":
        return ScriptedEngine(script)
    if name == "transformers":
        return TransformersEngine(max_batch_size=512)
    return VLLMEngine(kv_cache_gib=0.05, max_num_seqs=512) if name == "vllm" else RemoteVLLMEngine([url], SHM)


SHM = Path("/dev/shm")


def rng_state() -> tuple:
    return random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


class StartedEngines:
    """Engines by name, each started without weights at its first use.

    Attributes:
        changed_process: names of engines whose start changed random states or thread settings of this process.
    """

    def __init__(self, model_path: str, builder: PromptBuilder) -> None:
        self.spec, self.builder = EngineSpec(model_path, MAX_MODEL_LEN), builder
        self.engines: dict[str, RolloutEngine] = {}
        self.changed_process: list[str] = []

    def get(self, name: str, url: str = "") -> RolloutEngine:
        if name not in self.engines:
            engine = make_engine(name, url)
            before = rng_state(), torch.get_num_threads(), torch.set_num_threads
            engine.start(self.spec, self.builder)
            if before != (rng_state(), torch.get_num_threads(), torch.set_num_threads):
                self.changed_process.append(name)
            assert engine.policy_version is None
            self.engines[name] = engine
        return self.engines[name]

    def close(self, name: str) -> None:
        self.engines.pop(name).close()


def make_prompts(builder: PromptBuilder, count: int) -> list[Prompt]:
    return [builder.prompt(Question(f"q{i}", f"{i} + {3 * i} = ?" * (1 + i % 2), "")) for i in range(count)]


def ids(rollouts: Iterable[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.token_ids for rollout in rollouts]


def scaled(model: torch.nn.Module, factor: float) -> dict[str, Tensor]:
    return {name: parameter.detach() * factor for name, parameter in model.named_parameters()}


def flip_bit(weight: Tensor) -> Tensor:
    """Return a copy whose element 7 differs by the smallest amount."""
    weight = weight.detach().clone()
    weight[7] = torch.nextafter(weight[7], torch.tensor(9.0))
    return weight


def forward_logprobs(model: torch.nn.Module, rollout: Rollout) -> Tensor:
    """Log-probabilities [N] of the response's tokens from one forward pass over prompt + response."""
    row = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
    with torch.no_grad():
        logits = model(row).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None]).squeeze(1)


def check_logprobs(model: torch.nn.Module, rollouts: Iterable[Rollout]) -> None:
    """Assert that the log-probabilities of responses are those of plain forward passes."""
    for rollout in rollouts:
        ours, expected = torch.tensor(rollout.logprobs), forward_logprobs(model, rollout)
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)


def join_steps(steps: Iterable[Mapping[int, TokenChunk]], count: int) -> list[TokenChunk]:
    """Concatenate the tokens of all steps for each of `count` responses."""
    joined = [TokenChunk()] * count
    for step in steps:
        for i, chunk in step.items():
            joined[i] = TokenChunk(joined[i].token_ids + chunk.token_ids, joined[i].logprobs + chunk.logprobs)
    return joined


def exact_distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities [V]: the smallest set of likeliest tokens whose tempered mass reaches `top_p`, renormalised."""
    probabilities = (logits.double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    mass_before = probabilities[order].cumsum(0) - probabilities[order]
    probabilities[order[mass_before >= top_p]] = 0
    return probabilities / probabilities.sum()


def assert_same_distribution(observed: Tensor, expected: Tensor) -> None:
    """Assert by chi-square that observed counts [V] follow the expected ones: at most 6 standard deviations above its
    mean, rare tokens in one bin."""
    assert not observed[expected == 0].any()
    common = expected >= 10
    observed, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (observed, expected))
    kept = expected > 0
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert freedom > 10 and chi_square < freedom + 6 * (2 * freedom) ** 0.5
