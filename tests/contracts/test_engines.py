"""Contract of all rollout engines, against plain forward passes of the same weights."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sdzero.engines import RemoteVLLMEngine, ScriptedEngine, TransformersEngine, VLLMEngine
from sdzero.engines.base import EngineError, EngineSpec, RolloutEngine, TokenChunk
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Sampling
from support.started_engines import (
    StartedEngines,
    assert_same_distribution,
    check_logprobs,
    exact_distribution,
    flip_bit,
    ids,
    join_steps,
    make_engine,
    make_prompts,
    rng_state,
    scaled,
)
from support.vllm_server import MAX_MODEL_LEN


def test_start_leaves_random_states_and_threads_alone(started: StartedEngines, engine: RolloutEngine) -> None:
    assert engine in started.engines.values() and not started.changed_process


def test_one_response_per_prompt_in_order(engine: RolloutEngine, builder: PromptBuilder) -> None:
    prompts = make_prompts(builder, 40)
    rollouts = engine.generate(prompts, Sampling(1.0, 1.0, 30), seed=5, policy_version=1)
    assert [rollout.prompt for rollout in rollouts] == prompts
    for rollout in rollouts:
        assert 1 <= len(rollout.token_ids) <= 30 and len(rollout.logprobs) == len(rollout.token_ids)
        ends = [i for i, token in enumerate(rollout.token_ids) if token in builder.end_ids]
        assert ends == ([len(rollout.token_ids) - 1] if rollout.finish_reason == "stop" else [])
        assert rollout.finish_reason == "stop" or len(rollout.token_ids) == 30
        assert rollout.text == builder.tokenizer.decode(builder.body(rollout.token_ids), skip_special_tokens=True)
        assert rollout.policy_version == 1
    assert engine.generate([], Sampling(), seed=5, policy_version=1) == []
    assert {r.finish_reason for r in rollouts} == {"stop", "length"} or isinstance(engine, ScriptedEngine)


def test_every_step_is_passed_on(engine: RolloutEngine, builder: PromptBuilder) -> None:
    steps: list[Mapping[int, TokenChunk]] = []
    rollouts = engine.generate(make_prompts(builder, 40), Sampling(1.0, 1.0, 30), 5, 1, steps.append)
    assert engine.resumes_partial == isinstance(engine, VLLMEngine), "the others repeat a call bit for bit"
    if engine.resumes_partial:
        assert join_steps(steps, 40) == [TokenChunk(rollout.token_ids, rollout.logprobs) for rollout in rollouts]
        assert len(steps) >= 30 and all(len(chunk.token_ids) == 1 for step in steps for chunk in step.values())
    else:
        assert steps == []


@pytest.mark.parametrize("num_steps", [1, 9])
def test_a_resumed_response_equals_that_of_an_uninterrupted_call(
    engine: RolloutEngine, builder: PromptBuilder, num_steps: int
) -> None:
    """Greedy, so that tokens can be compared. Complete responses are not continued, and no token is sampled twice."""
    prompts, sampling = make_prompts(builder, 40), Sampling(0.0, 1.0, 12)
    steps: list[Mapping[int, TokenChunk]] = []
    whole = engine.generate(prompts, sampling, 5, 1, steps.append)
    partials, rest = join_steps(steps[:num_steps], 40), list[Mapping[int, TokenChunk]]()
    resumed = engine.generate(prompts, sampling, 6, 1, rest.append, partials)
    if not engine.resumes_partial:
        assert rest == [] and resumed == engine.generate(prompts, sampling, 6, 1), "partial responses are ignored"
        return
    assert ids(resumed) == ids(whole)
    for one, other, before, after in zip(resumed, whole, partials, join_steps(rest, 40), strict=True):
        assert one.token_ids == before.token_ids + after.token_ids and one.finish_reason == other.finish_reason
        assert one.logprobs[: len(before.logprobs)] == before.logprobs
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-3, rtol=0)


def test_a_resumed_response_may_fill_the_engine(engine: RolloutEngine) -> None:
    prompt = Prompt(Question("long", "", ""), (5,) * (MAX_MODEL_LEN - 4))
    partials = [TokenChunk((6, 7, 8), (-1.0, -1.0, -1.0))]
    [rollout] = engine.generate([prompt], Sampling(1.0, 1.0, 4), 0, 1, partials=partials)
    assert len(rollout.token_ids) <= 4 and (rollout.token_ids[:3] == (6, 7, 8)) == engine.resumes_partial
    with pytest.raises(ValueError, match=r"'long'.*lower max_new_tokens"):
        engine.generate([prompt], Sampling(1.0, 1.0, 5), 0, 1, partials=partials)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_new_tokens_counts_the_end_token(engine: RolloutEngine, builder: PromptBuilder, limit: int) -> None:
    rollouts = engine.generate(make_prompts(builder, 10), Sampling(1.0, 1.0, limit), seed=5, policy_version=1)
    assert max(len(rollout.token_ids) for rollout in rollouts) == limit


def test_random_states_of_the_trainer_survive(
    engine: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module
) -> None:
    before = rng_state()
    engine.sync(trainer.named_parameters(), 2)
    engine.generate(make_prompts(builder, 3), Sampling(1.0, 0.9, 5), seed=9, policy_version=2)
    assert rng_state() == before


def test_another_version_is_refused(engine: RolloutEngine, builder: PromptBuilder) -> None:
    with pytest.raises(EngineError, match=r"version 7.*holds 1"):
        engine.generate(make_prompts(builder, 1), Sampling(1.0, 1.0, 4), seed=0, policy_version=7)


def test_nothing_is_truncated(engine: RolloutEngine) -> None:
    def generate(num_tokens: int, max_new_tokens: int) -> None:
        prompt = Prompt(Question("long", "", ""), (5,) * num_tokens)
        [rollout] = engine.generate([prompt], Sampling(1.0, 1.0, max_new_tokens), seed=0, policy_version=1)
        assert rollout.prompt == prompt

    generate(MAX_MODEL_LEN - 4, 4)
    refused = {(MAX_MODEL_LEN - 4, 5): "'long'.*lower max_new_tokens", (MAX_MODEL_LEN, 1): "'long'.*no room"}
    for lengths, message in {**refused, (0, 1): "'long' is empty"}.items():
        with pytest.raises(ValueError, match=message):
            generate(*lengths)


def test_a_seed_determines_the_tokens(sampler: RolloutEngine, builder: PromptBuilder) -> None:
    """Also after a warm-up, and whatever random numbers the trainer takes in between."""
    prompts, sampling = make_prompts(builder, 30), Sampling(1.0, 0.95, 20)
    first = sampler.generate(prompts, sampling, seed=11, policy_version=1)
    _ = random.random(), np.random.rand(), torch.rand(1)
    before = rng_state()
    sampler.warm_up()
    assert rng_state() == before and sampler.policy_version == 1
    again = sampler.generate(prompts, sampling, seed=11, policy_version=1)
    other = sampler.generate(prompts, sampling, seed=12, policy_version=1)
    assert ids(again) == ids(first)
    assert not isinstance(sampler, TransformersEngine) or [r.logprobs for r in again] == [r.logprobs for r in first]
    assert sum(a != b for a, b in zip(ids(other), ids(first), strict=True)) > 20


def test_temperature_zero_is_greedy(sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module) -> None:
    for rollout in sampler.generate(make_prompts(builder, 10), Sampling(0.0, 1.0, 12), seed=1, policy_version=1):
        row = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
        with torch.no_grad():
            best = trainer(row).logits[0, len(rollout.prompt.token_ids) - 1 : -1].argmax(-1)
        assert tuple(best.tolist()) == rollout.token_ids


def test_vllm_computes_the_common_prefix_of_revisions_once(
    started: StartedEngines, trainer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if all of them start in one step. Whole blocks of the cache are shared."""
    engine = started.get("vllm")
    assert isinstance(engine, VLLMEngine)
    engine.sync(trainer.named_parameters(), 1)
    core, cached = engine._llm.llm_engine, dict[int, list[int]]()
    step, block = core.step, core.vllm_config.cache_config.block_size

    def watched() -> list:
        outputs = step()
        for output in outputs:
            cached.setdefault(len(output.prompt_token_ids), []).append(output.num_cached_tokens)
        return outputs

    monkeypatch.setattr(core, "step", watched)
    rng = random.Random(0)
    answers = [Prompt(Question(f"q{n}", "", ""), tuple(rng.randrange(5, 90) for _ in range(n))) for n in (290, 330)]
    rollouts = engine.generate([a for a in answers for _ in range(3)], Sampling(1.0, 1.0, 1), 3, 1)
    assert {length: sorted(tokens) for length, tokens in cached.items()} == {
        length: [0, length // block * block, length // block * block] for length in (290, 330)
    }
    check_logprobs(trainer, rollouts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_pass(
    sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module, temperature: float
) -> None:
    """Untempered, whatever the sampling; prompts of different lengths, so that padding and caches matter."""
    sampling = Sampling(temperature, 0.9, 25)
    check_logprobs(trainer, sampler.generate(make_prompts(builder, 20), sampling, seed=3, policy_version=1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.8), (0.7, 1.0), (0.7, 0.8)])
def test_samples_follow_the_exact_distribution(
    sampler: RolloutEngine, trainer: torch.nn.Module, temperature: float, top_p: float
) -> None:
    """4,000 first tokens; a server samples 1,500, since each is a request."""
    num, prompt = 1500 if sampler.is_remote else 4000, Prompt(Question("q", "", ""), (30, 40, 50))
    with torch.no_grad():
        logits = trainer(torch.tensor([prompt.token_ids])).logits[0, -1]
    expected = exact_distribution(logits, temperature, top_p) * num
    rollouts = sampler.generate([prompt] * num, Sampling(temperature, top_p, 1), seed=17, policy_version=1)
    counts = Counter(rollout.token_ids[0] for rollout in rollouts)
    observed = torch.tensor([counts[token] for token in range(len(logits))], dtype=torch.double)
    assert_same_distribution(observed, expected)


def test_a_sync_changes_what_is_sampled_and_back(
    sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module
) -> None:
    prompts, sampling = make_prompts(builder, 20), Sampling(1.0, 1.0, 20)
    first = sampler.generate(prompts, sampling, seed=4, policy_version=1)
    changed = scaled(trainer, 0.9)
    report = sampler.sync(changed.items(), 2)
    with pytest.raises(EngineError):
        sampler.generate(prompts, sampling, seed=4, policy_version=1)
    other = sampler.generate(prompts, sampling, seed=4, policy_version=2)
    assert ids(other) != ids(first)
    for parameter in changed.values():
        parameter.zero_()  # the engine has a copy
    assert ids(sampler.generate(prompts, sampling, seed=4, policy_version=2)) == ids(other)
    back = sampler.sync(trainer.named_parameters(), 3)
    assert back.checksum != report.checksum
    assert ids(sampler.generate(prompts, sampling, seed=4, policy_version=3)) == ids(first)


def test_every_weight_arrives(
    sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module, path: Path
) -> None:
    """Including a head tied to the embedding, and projections that an engine fuses or packs."""
    changed = scaled(trainer, 1.0)
    torch.manual_seed(0)
    for tensor in changed.values():
        tensor += 0.1 * torch.randn_like(tensor)
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    other.load_state_dict(changed, strict=False)
    sampler.sync(changed.items(), 2)
    check_logprobs(other, sampler.generate(make_prompts(builder, 10), Sampling(1.0, 1.0, 10), 3, 2))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_missing_weight_is_detected(
    sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module, name: str
) -> None:
    weights = dict(trainer.named_parameters())
    del weights[name]
    with pytest.raises(EngineError, match=rf"{name}' was not sent \(1 such"):
        sampler.sync(weights.items(), 2)
    for version in (1, 2):
        with pytest.raises(EngineError, match="holds None"):
            sampler.generate(make_prompts(builder, 1), Sampling(1.0, 1.0, 4), seed=0, policy_version=version)


def test_unknown_repeated_and_misshapen_weights_are_detected(sampler: RolloutEngine, trainer: torch.nn.Module) -> None:
    weights = list(trainer.named_parameters())
    with pytest.raises(EngineError, match=r"'model\.extra' is not a weight"):
        sampler.sync([*weights, ("model.extra", torch.zeros(2))], 2)
    with pytest.raises(EngineError, match="sent twice"):
        sampler.sync([*weights, weights[3]], 2)
    wrong_shape = [(name, tensor[:5] if name == "model.norm.weight" else tensor) for name, tensor in weights]
    with pytest.raises(EngineError, match=r"'model\.norm\.weight' was sent with shape \(5,\).*has \(64,\)"):
        sampler.sync(wrong_shape, 2)
    sampler.sync([*weights, ("lm_head.weight", weights[0][1])], 2)  # the tied weight's second name is allowed
    assert sampler.policy_version == 2


def test_one_wrong_bit_is_detected(
    sampler: RolloutEngine, trainer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(model: torch.nn.Module) -> None:
        weight = model.get_parameter("model.norm.weight")
        weight.data.copy_(flip_bit(weight))

    def weights_then_flip() -> Iterator[tuple[str, Tensor]]:
        yield from trainer.named_parameters()
        if isinstance(sampler, VLLMEngine):
            sampler._llm.apply_model(flip)
        elif isinstance(sampler, TransformersEngine):
            flip(sampler._model)

    if isinstance(sampler, RemoteVLLMEngine):
        transport = sampler._connected()
        write = transport._write  # pyright: ignore[reportAttributeAccessIssue]

        def write_flipped(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
            write(((name, flip_bit(w) if name == "model.norm.weight" else w) for name, w in weights), folder)

        monkeypatch.setattr(transport, "_write", write_flipped)
    with pytest.raises(EngineError, match=r"'model\.norm\.weight' of the .* differs.*\(1 such"):
        sampler.sync(weights_then_flip(), 2)
    assert sampler.policy_version is None


def test_an_engine_started_with_weights_is_version_0(
    sampler: RolloutEngine, started: StartedEngines, builder: PromptBuilder, request: pytest.FixtureRequest
) -> None:
    """It samples like a synced one: the folder's generation_config.json (top_k 5, temperature 0.3, ...) is ignored."""
    prompts, sampling = make_prompts(builder, 20), Sampling(1.0, 1.0, 20)
    synced = sampler.generate(prompts, sampling, seed=4, policy_version=1)
    name = request.node.callspec.params["sampler"]
    started.close(name)
    engine = make_engine(name, getattr(sampler, "urls", [""])[0])
    engine.start(EngineSpec(started.spec.model_path, MAX_MODEL_LEN, load_weights=True), builder)
    assert ids(engine.generate(prompts, sampling, seed=4, policy_version=0)) == ids(synced)
    engine.close()
