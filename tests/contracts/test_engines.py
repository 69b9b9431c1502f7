"""What every rollout engine promises, held against plain forward passes of the same weights."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sdzero.data import RolloutDataModule
from sdzero.engines import RemoteVLLMEngine, ScriptedEngine, TransformersEngine, VLLMEngine
from sdzero.engines.base import EngineDied, EngineError, EngineSpec, RolloutEngine, TokenChunk
from sdzero.methods import SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Rollout, Sampling
from support.helpers import Toy, fit
from support.tiny_model import write_tiny_model
from support.vllm_server import vllm_server

MAX_MODEL_LEN = 512


def script(prompt: Prompt, seed: int) -> str:
    return "answer " * (seed % 3 + len(prompt.question.id))


FACTORIES = {
    "scripted": lambda: ScriptedEngine(script),
    "transformers": lambda: TransformersEngine(max_batch_size=512),
    "vllm": lambda: VLLMEngine(kv_cache_gib=0.05, max_num_seqs=512),
    "remote": lambda: RemoteVLLMEngine(SERVERS, Path("/dev/shm")),
}
SERVERS: list[str] = []
"""The URL of this module's server, once a test needs it."""


def rng_state() -> tuple:
    return random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def builder(model_path: str) -> PromptBuilder:
    return PromptBuilder.from_pretrained(model_path)


@pytest.fixture(scope="module")
def trainer(model_path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


class Started:
    """Each engine is started once, without weights, and says whether that touched the trainer's process."""

    def __init__(self, model_path: str, builder: PromptBuilder, log: Path) -> None:
        self.log, self.stack = log, ExitStack()
        self.spec, self.builder = EngineSpec(model_path, MAX_MODEL_LEN), builder
        self.engines: dict[str, RolloutEngine] = {}
        self.process_kept: dict[str, bool] = {}

    def close(self, name: str) -> None:
        self.engines.pop(name).close()

    def __getitem__(self, name: str) -> RolloutEngine:
        if name == "remote" and not SERVERS:
            SERVERS.append(self.stack.enter_context(vllm_server(self.spec.model_path, self.log, MAX_MODEL_LEN)))
        if name not in self.engines:
            engine = FACTORIES[name]()
            before = rng_state(), torch.get_num_threads(), torch.set_num_threads
            engine.start(self.spec, self.builder)
            self.process_kept[name] = before == (rng_state(), torch.get_num_threads(), torch.set_num_threads)
            assert engine.policy_version is None
            self.engines[name] = engine
        return self.engines[name]


@pytest.fixture(scope="module")
def started(model_path: str, builder: PromptBuilder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(model_path, builder, tmp_path_factory.mktemp("server") / "log")
    with started.stack:
        yield started
        for name in list(started.engines):
            started.close(name)
    SERVERS.clear()


@pytest.fixture(params=FACTORIES)
def engine(request: pytest.FixtureRequest, started: Started, trainer: torch.nn.Module) -> RolloutEngine:
    """Holds the trainer's weights as version 1."""
    engine = started[request.param]
    engine.sync(trainer.named_parameters(), 1)
    return engine


@pytest.fixture(params=["transformers", "vllm", "remote"])
def sampler(request: pytest.FixtureRequest, started: Started, trainer: torch.nn.Module) -> RolloutEngine:
    engine = started[request.param]
    engine.sync(trainer.named_parameters(), 1)
    return engine


def prompts(builder: PromptBuilder, count: int) -> list[Prompt]:
    return [builder.prompt(Question(f"q{i}", f"{i} + {3 * i} = ?" * (1 + i % 2), "")) for i in range(count)]


def ids(rollouts: Iterable[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.token_ids for rollout in rollouts]


def scaled(model: torch.nn.Module, factor: float) -> dict[str, Tensor]:
    return {name: parameter.detach() * factor for name, parameter in model.named_parameters()}


def forward_logprobs(model: torch.nn.Module, rollout: Rollout) -> Tensor:
    """Log-probabilities [N] of the response's tokens from one forward pass over prompt + response."""
    row = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
    with torch.no_grad():
        logits = model(row).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None]).squeeze(1)


def test_start_leaves_random_states_and_threads_alone(started: Started, engine: RolloutEngine) -> None:
    name = next(name for name, value in started.engines.items() if value is engine)
    assert started.process_kept[name]


def test_one_response_per_prompt_in_order(engine: RolloutEngine, builder: PromptBuilder) -> None:
    asked = prompts(builder, 40)
    rollouts = engine.generate(asked, Sampling(1.0, 1.0, 30), seed=5, policy_version=1)
    assert [rollout.prompt for rollout in rollouts] == asked
    reasons = set()
    for rollout in rollouts:
        assert 1 <= len(rollout.token_ids) <= 30 and len(rollout.logprobs) == len(rollout.token_ids)
        ends = [place for place, token in enumerate(rollout.token_ids) if token in builder.end_ids]
        assert ends == ([len(rollout.token_ids) - 1] if rollout.finish_reason == "stop" else [])
        assert rollout.finish_reason == "stop" or len(rollout.token_ids) == 30
        assert rollout.text == builder.tokenizer.decode(builder.body(rollout.token_ids), skip_special_tokens=True)
        assert rollout.policy_version == 1
        reasons.add(rollout.finish_reason)
    assert engine.generate([], Sampling(), seed=5, policy_version=1) == []
    assert reasons == {"stop", "length"} or isinstance(engine, ScriptedEngine)


def joined(steps: Iterable[Mapping[int, TokenChunk]], count: int) -> list[TokenChunk]:
    """What all steps together drew of each of `count` responses."""
    drawn: list[TokenChunk] = [TokenChunk()] * count
    for step in steps:
        for place, piece in step.items():
            drawn[place] = TokenChunk(drawn[place].token_ids + piece.token_ids, drawn[place].logprobs + piece.logprobs)
    return drawn


def test_every_step_is_handed_out(engine: RolloutEngine, builder: PromptBuilder) -> None:
    steps: list[Mapping[int, TokenChunk]] = []
    rollouts = engine.generate(prompts(builder, 40), Sampling(1.0, 1.0, 30), 5, 1, steps.append)
    assert engine.resumes_partial == isinstance(engine, VLLMEngine), "the others repeat a call to the bit"
    if engine.resumes_partial:
        assert joined(steps, 40) == [TokenChunk(rollout.token_ids, rollout.logprobs) for rollout in rollouts]
        assert len(steps) >= 30 and all(len(piece.token_ids) == 1 for step in steps for piece in step.values())
    else:
        assert steps == []


@pytest.mark.parametrize("num_steps", [1, 9])
def test_a_continued_response_is_that_of_a_call_that_was_not_cut_short(
    engine: RolloutEngine, builder: PromptBuilder, num_steps: int
) -> None:
    """Greedy, so that it is told by its tokens. What has ended is not drawn on, and no token is drawn twice."""
    asked, sampling = prompts(builder, 40), Sampling(0.0, 1.0, 12)
    steps: list[Mapping[int, TokenChunk]] = []
    whole = engine.generate(asked, sampling, 5, 1, steps.append)
    partials, rest = joined(steps[:num_steps], 40), list[Mapping[int, TokenChunk]]()
    continued = engine.generate(asked, sampling, 6, 1, rest.append, partials)
    if not engine.resumes_partial:
        assert rest == [] and continued == engine.generate(asked, sampling, 6, 1), "they draw anew"
        return
    assert ids(continued) == ids(whole)
    for one, other, before, after in zip(continued, whole, partials, joined(rest, 40), strict=True):
        assert one.token_ids == before.token_ids + after.token_ids and one.finish_reason == other.finish_reason
        assert one.logprobs[: len(before.logprobs)] == before.logprobs
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-3, rtol=0)


def test_a_continued_response_may_fill_the_engine(engine: RolloutEngine) -> None:
    prompt = Prompt(Question("long", "", ""), (5,) * (MAX_MODEL_LEN - 4))
    partials = [TokenChunk((6, 7, 8), (-1.0, -1.0, -1.0))]
    [rollout] = engine.generate([prompt], Sampling(1.0, 1.0, 4), 0, 1, partials=partials)
    assert len(rollout.token_ids) <= 4 and (rollout.token_ids[:3] == (6, 7, 8)) == engine.resumes_partial
    with pytest.raises(ValueError, match=r"'long'.*lower max_new_tokens"):
        engine.generate([prompt], Sampling(1.0, 1.0, 5), 0, 1, partials=partials)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_new_tokens_counts_the_end_token(engine: RolloutEngine, builder: PromptBuilder, limit: int) -> None:
    rollouts = engine.generate(prompts(builder, 10), Sampling(1.0, 1.0, limit), seed=5, policy_version=1)
    assert max(len(rollout.token_ids) for rollout in rollouts) == limit


def test_random_states_of_the_trainer_survive(
    engine: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module
) -> None:
    before = rng_state()
    engine.sync(trainer.named_parameters(), 2)
    engine.generate(prompts(builder, 3), Sampling(1.0, 0.9, 5), seed=9, policy_version=2)
    assert rng_state() == before


def test_another_version_is_refused(engine: RolloutEngine, builder: PromptBuilder) -> None:
    with pytest.raises(EngineError, match=r"version 7.*holds 1"):
        engine.generate(prompts(builder, 1), Sampling(1.0, 1.0, 4), seed=0, policy_version=7)


def test_nothing_is_truncated(engine: RolloutEngine, builder: PromptBuilder) -> None:
    question = Question("long", "", "")
    full = Prompt(question, (5,) * (MAX_MODEL_LEN - 4))
    assert engine.generate([full], Sampling(1.0, 1.0, 4), seed=0, policy_version=1)[0].prompt == full
    with pytest.raises(ValueError, match=r"'long'.*lower max_new_tokens"):
        engine.generate([full], Sampling(1.0, 1.0, 5), seed=0, policy_version=1)
    with pytest.raises(ValueError, match=r"'long'.*no room"):
        engine.generate([Prompt(question, (5,) * MAX_MODEL_LEN)], Sampling(1.0, 1.0, 1), seed=0, policy_version=1)
    with pytest.raises(ValueError, match="'long' is empty"):
        engine.generate([Prompt(question, ())], Sampling(1.0, 1.0, 1), seed=0, policy_version=1)


def test_a_seed_names_its_tokens(sampler: RolloutEngine, builder: PromptBuilder) -> None:
    asked, sampling = prompts(builder, 30), Sampling(1.0, 1.0, 20)
    first = sampler.generate(asked, sampling, seed=11, policy_version=1)
    _ = random.random(), np.random.rand(), torch.rand(1)  # what the trainer draws in between does not matter
    again = sampler.generate(asked, sampling, seed=11, policy_version=1)
    other = sampler.generate(asked, sampling, seed=12, policy_version=1)
    assert ids(again) == ids(first)
    assert not isinstance(sampler, TransformersEngine) or [r.logprobs for r in again] == [r.logprobs for r in first]
    assert sum(a != b for a, b in zip(ids(other), ids(first), strict=True)) > 20


def test_temperature_zero_is_greedy(sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module) -> None:
    for rollout in sampler.generate(prompts(builder, 10), Sampling(0.0, 1.0, 12), seed=1, policy_version=1):
        row = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
        with torch.no_grad():
            best = trainer(row).logits[0, len(rollout.prompt.token_ids) - 1 : -1].argmax(-1)
        assert tuple(best.tolist()) == rollout.token_ids


def test_a_warm_up_changes_no_draw(sampler: RolloutEngine, builder: PromptBuilder) -> None:
    asked, sampling = prompts(builder, 20), Sampling(1.0, 0.9, 20)
    first = sampler.generate(asked, sampling, seed=11, policy_version=1)
    before = rng_state()
    sampler.warm_up()
    assert rng_state() == before and sampler.policy_version == 1
    assert ids(sampler.generate(asked, sampling, seed=11, policy_version=1)) == ids(first)


def test_vllm_computes_the_common_prefix_of_revisions_once(
    started: Started, trainer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though all of them enter it in one step. What is shared are whole blocks of the cache."""
    engine = started["vllm"]
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
    draw = random.Random(0)
    answers = [Prompt(Question(f"q{n}", "", ""), tuple(draw.randrange(5, 90) for _ in range(n))) for n in (290, 330)]
    rollouts = engine.generate([a for a in answers for _ in range(3)], Sampling(1.0, 1.0, 1), 3, 1)
    assert {length: sorted(tokens) for length, tokens in cached.items()} == {
        length: [0, length // block * block, length // block * block] for length in (290, 330)
    }
    for rollout in rollouts:
        torch.testing.assert_close(
            torch.tensor(rollout.logprobs), forward_logprobs(trainer, rollout), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_pass(
    sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module, temperature: float
) -> None:
    """Untempered, whatever the sampling; prompts of unlike lengths, so padding and caches are in play."""
    for rollout in sampler.generate(prompts(builder, 20), Sampling(temperature, 0.9, 25), seed=3, policy_version=1):
        expected = forward_logprobs(trainer, rollout)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-3, rtol=0)


def exact_distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities [V]: the smallest set of likeliest tokens whose tempered mass reaches `top_p`, renormalised."""
    probabilities = (logits.double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    mass_before = probabilities[order].cumsum(0) - probabilities[order]
    probabilities[order[mass_before >= top_p]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_follow_the_exact_distribution(
    sampler: RolloutEngine, trainer: torch.nn.Module, temperature: float, top_p: float
) -> None:
    """Chi-square of 4,000 first tokens, the rare ones lumped: 6 standard deviations above its mean is no chance. Of a
    server 1,500: each is a request."""
    draws, prompt = 1500 if sampler.is_remote else 4000, Prompt(Question("q", "", ""), (30, 40, 50))
    with torch.no_grad():
        logits = trainer(torch.tensor([prompt.token_ids])).logits[0, -1]
    expected = exact_distribution(logits, temperature, top_p) * draws
    rollouts = sampler.generate([prompt] * draws, Sampling(temperature, top_p, 1), seed=17, policy_version=1)
    counts = Counter(rollout.token_ids[0] for rollout in rollouts)
    observed = torch.tensor([counts[token] for token in range(len(logits))], dtype=torch.double)
    assert not observed[expected == 0].any()
    common = expected >= 10
    expected_bins = torch.cat([expected[common], expected[~common].sum()[None]])
    observed_bins = torch.cat([observed[common], observed[~common].sum()[None]])
    kept = expected_bins > 0
    chi_square = ((observed_bins - expected_bins)[kept] ** 2 / expected_bins[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert freedom > 10 and chi_square < freedom + 6 * (2 * freedom) ** 0.5


def test_a_sync_changes_what_is_sampled_and_back(
    sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module
) -> None:
    asked, sampling = prompts(builder, 20), Sampling(1.0, 1.0, 20)
    first = sampler.generate(asked, sampling, seed=4, policy_version=1)
    changed = scaled(trainer, 0.9)
    report = sampler.sync(changed.items(), 2)
    with pytest.raises(EngineError):
        sampler.generate(asked, sampling, seed=4, policy_version=1)
    other = sampler.generate(asked, sampling, seed=4, policy_version=2)
    assert ids(other) != ids(first)
    for parameter in changed.values():
        parameter.zero_()  # the engine's copy is its own
    assert ids(sampler.generate(asked, sampling, seed=4, policy_version=2)) == ids(other)
    back = sampler.sync(trainer.named_parameters(), 3)
    assert back.checksum != report.checksum
    assert ids(sampler.generate(asked, sampling, seed=4, policy_version=3)) == ids(first)


def test_every_weight_arrives(
    sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module, model_path: str
) -> None:
    """A head that is tied to the embedding too, and projections that an engine fuses or packs."""
    changed = scaled(trainer, 1.0)
    torch.manual_seed(0)
    for tensor in changed.values():
        tensor += 0.1 * torch.randn_like(tensor)
    other = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    other.load_state_dict(changed, strict=False)
    sampler.sync(changed.items(), 2)
    for rollout in sampler.generate(prompts(builder, 10), Sampling(1.0, 1.0, 10), seed=3, policy_version=2):
        expected = forward_logprobs(other, rollout)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_missing_weight_is_caught(
    sampler: RolloutEngine, builder: PromptBuilder, trainer: torch.nn.Module, name: str
) -> None:
    weights = dict(trainer.named_parameters())
    del weights[name]
    with pytest.raises(EngineError, match=rf"{name}' was not sent \(1 such"):
        sampler.sync(weights.items(), 2)
    for version in (1, 2):
        with pytest.raises(EngineError, match="holds None"):
            sampler.generate(prompts(builder, 1), Sampling(1.0, 1.0, 4), seed=0, policy_version=version)


def test_unknown_repeated_and_misshapen_weights_are_caught(sampler: RolloutEngine, trainer: torch.nn.Module) -> None:
    weights = list(trainer.named_parameters())
    with pytest.raises(EngineError, match=r"'model\.extra' is not a weight"):
        sampler.sync([*weights, ("model.extra", torch.zeros(2))], 2)
    with pytest.raises(EngineError, match="sent twice"):
        sampler.sync([*weights, weights[3]], 2)
    wrong_shape = [(name, tensor[:5] if name == "model.norm.weight" else tensor) for name, tensor in weights]
    with pytest.raises(EngineError, match=r"'model\.norm\.weight' was sent with shape \(5,\).*has \(64,\)"):
        sampler.sync(wrong_shape, 2)
    sampler.sync([*weights, ("lm_head.weight", weights[0][1])], 2)  # the tied weight's second name is no fault
    assert sampler.policy_version == 2


def flipped(weight: Tensor) -> Tensor:
    weight = weight.detach().clone()
    weight[7] = torch.nextafter(weight[7], torch.tensor(9.0))
    return weight


def garbled(transport: Any) -> Any:
    """A folder that is written with another bit than was sent."""
    write = transport._write

    def garbling(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        write(((name, flipped(w) if name == "model.norm.weight" else w) for name, w in weights), folder)

    return garbling


def test_one_wrong_bit_is_caught(
    sampler: RolloutEngine, trainer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(model: torch.nn.Module) -> None:
        weight = model.get_parameter("model.norm.weight")
        weight.data.copy_(flipped(weight))

    def garbling() -> Iterator[tuple[str, Tensor]]:
        yield from trainer.named_parameters()
        if isinstance(sampler, VLLMEngine):
            sampler._llm.apply_model(flip)
        elif isinstance(sampler, TransformersEngine):
            flip(sampler._model)

    if isinstance(sampler, RemoteVLLMEngine):
        monkeypatch.setattr(sampler._connected(), "_write", garbled(sampler._connected()))
    with pytest.raises(EngineError, match=r"'model\.norm\.weight' of the .* differs.*\(1 such"):
        sampler.sync(garbling(), 2)
    assert sampler.policy_version is None


@pytest.mark.parametrize("name", ["transformers", "vllm", "remote"])
def test_a_second_engine_started_with_weights_is_version_0(
    name: str, started: Started, builder: PromptBuilder, trainer: torch.nn.Module
) -> None:
    """It samples like a synced one: the folder's generation_config.json (top_k 5, temperature 0.3, ...) has no say."""
    asked, sampling = prompts(builder, 20), Sampling(1.0, 1.0, 20)
    started[name].sync(trainer.named_parameters(), 1)
    synced = started[name].generate(asked, sampling, seed=4, policy_version=1)
    started.close(name)
    engine = FACTORIES[name]()
    engine.start(EngineSpec(started.spec.model_path, MAX_MODEL_LEN, load_weights=True), builder)
    assert ids(engine.generate(asked, sampling, seed=4, policy_version=0)) == ids(synced)
    engine.close()


def test_a_server_that_took_nothing_is_caught(
    started: Started, trainer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started["remote"]
    assert isinstance(engine, RemoteVLLMEngine)
    engine.sync(trainer.named_parameters(), 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine._connected(), "send", list)  # takes the weights, and keeps them
        with pytest.raises(EngineError, match=r"'model\.layers.* of the vLLM server at .* differs from what was sent"):
            engine.sync(scaled(trainer, 1.5).items(), 2)
    assert engine.policy_version is None
    engine.sync(trainer.named_parameters(), 3)


def test_weights_that_another_trainer_put_into_the_server_are_refused(
    started: Started, builder: PromptBuilder, trainer: torch.nn.Module
) -> None:
    """Each response names the weights that drew it: the very next one tells."""
    engine = started["remote"]
    engine.sync(trainer.named_parameters(), 1)
    other = FACTORIES["remote"]()
    other.start(started.spec, builder)
    other.sync(scaled(trainer, 0.9).items(), 1)
    with pytest.raises(EngineDied, match=r"was sampled from weights \['1-.*'\], not 1-.*: another trainer uses"):
        engine.generate(prompts(builder, 2), Sampling(1.0, 1.0, 4), seed=0, policy_version=1)
    other.close()


def test_a_folder_keeps_nothing(started: Started, trainer: torch.nn.Module, tmp_path: Path) -> None:
    started["remote"]  # the server is up
    engine = RemoteVLLMEngine(SERVERS, tmp_path / "weights")
    engine.start(started.spec, started.builder)
    assert engine.sync(trainer.named_parameters(), 1).checksum == engine.sync(trainer.named_parameters(), 2).checksum
    assert not list((tmp_path / "weights").iterdir())
    with pytest.raises(EngineError, match=r"did not reach the vLLM server"):
        engine.folder = Path("/proc")  # where nothing can be written
        engine._transport = None
        engine.sync(trainer.named_parameters(), 3)
    engine.close()


def test_a_fit_draws_from_a_server_while_it_trains(started: Started, tmp_path: Path) -> None:
    """Weights that move far at each step: rollouts from others than the compared ones would be nats off."""
    started["remote"]  # the server is up
    data = RolloutDataModule(
        *(Toy(), RemoteVLLMEngine(SERVERS, Path("/dev/shm")), 8, 2),
        sampling=Sampling(max_new_tokens=20),
        max_logprob_gap=1e-3,
        overlap=True,
    )
    model = ModelConfig(started.spec.model_path)
    steps = fit(SelfDistill(model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)), data, tmp_path)
    assert steps.curve("rollout/policy_lag") == [0, 1, 1, 1]
    assert max(steps.curve("rollout/logprob_gap")) < 1e-4
    assert min(steps.curve("train/grad_norm")) > 0
