"""VLLMEngine around a vLLM that is played by a tiny model and a list: order of calls, death, deadline, waiting room."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdzero.engines import VLLMEngine, vllm
from sdzero.engines.base import EngineError, EngineSpec, TokenChunk
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Sampling
from support.tiny_model import write_tiny_model

PROMPTS = [Prompt(Question(f"q{i}", "", ""), (5, 6, 7)) for i in range(4)]


def finished(request_id: str, token_ids: list[int], reason: str | None = "length") -> Any:
    """What a step brought for a request: with a reason, its end."""
    flat = SimpleNamespace(logprobs=[-0.5] * len(token_ids))
    output = SimpleNamespace(token_ids=token_ids, logprobs=flat, finish_reason=reason)
    return SimpleNamespace(request_id=request_id, finished=reason is not None, outputs=[output])


class FakeLLM:
    """Answers each request with tokens 9 9, one request a step; `calls` is what was asked of it."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.calls: list[str] = []
        self.model = AutoModelForCausalLM.from_pretrained(options["model"])
        self.llm_engine = self
        self.asked: list[tuple[list[int], int]] = []  # each request's tokens, and how many may follow
        self.waiting: list[str] = []
        self.on_step: Callable[[], list[Any]] | None = None
        self.can_reset = True

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.params = params
        self.asked.append((prompt["prompt_token_ids"], params.max_tokens))
        self.waiting.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        if self.on_step:
            return self.on_step()
        return [finished(self.waiting.pop(), [9, 9])]

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        with torch.no_grad():
            for name, tensor in kwargs["weights_iterator"]:
                self.model.get_parameter(name).copy_(tensor)

    def apply_model(self, function: Callable[[torch.nn.Module], Any]) -> list[Any]:
        return [function(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return self.can_reset

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake_up {tags}")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def start(model_path: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[VLLMEngine, FakeLLM]]:
    """Starts an engine with loaded weights on the fake; `on_cpu` says what the fake vLLM runs on."""

    def start(on_cpu: bool = True, load_weights: bool = True, **options: Any) -> tuple[VLLMEngine, FakeLLM]:
        monkeypatch.setattr(vllm, "_import_vllm", lambda: (FakeLLM, on_cpu))
        monkeypatch.setattr(vllm.vllm_patches, "environment_variables", lambda tensor_parallel_size: {})
        engine = VLLMEngine(**options)
        engine.start(EngineSpec(model_path, 64, load_weights=load_weights), PromptBuilder.from_pretrained(model_path))
        return engine, engine._llm

    return start


def generate(engine: VLLMEngine, max_new_tokens: int = 2) -> list[Any]:
    assert engine.policy_version is not None
    return engine.generate(PROMPTS, Sampling(0.7, 0.9, max_new_tokens), 0, engine.policy_version)


def test_sleep_and_wake_follow_the_order_that_keeps_weights_and_cache_apart(start: Any) -> None:
    engine, llm = start(on_cpu=False, load_weights=False)
    weights = dict(AutoModelForCausalLM.from_pretrained(llm.options["model"]).named_parameters())
    assert llm.options["enable_sleep_mode"] and llm.options["load_format"] == "dummy"
    assert not llm.options["enforce_eager"]
    engine.sync(weights.items(), 1)
    engine.sleep()
    engine.sleep()  # sleeping twice is sleeping
    with pytest.raises(EngineError, match="holds None"):
        engine.generate(PROMPTS, Sampling(1.0, 1.0, 2), 0, 1)
    engine.wake()
    engine.sync(weights.items(), 2)
    engine.generate(PROMPTS, Sampling(1.0, 1.0, 2), 0, 2)
    assert llm.calls == [
        *("reload_weights", "reset_prefix_cache"),
        *("sleep 2", "wake_up ['weights']", "reload_weights", "reset_prefix_cache", "wake_up ['kv_cache']"),
        "reset_prefix_cache",
    ]


def test_a_sync_wakes_a_sleeping_engine(start: Any) -> None:
    engine, llm = start(on_cpu=False)
    engine.sleep()
    engine.sync(list(llm.model.named_parameters()), 1)
    assert llm.calls[1:] == ["wake_up ['weights']", "reload_weights", "reset_prefix_cache", "wake_up ['kv_cache']"]


def test_on_the_cpu_nobody_sleeps(start: Any) -> None:
    engine, llm = start(kv_cache_gib=0.5)
    engine.sleep()
    engine.wake()
    assert llm.calls == [] and engine.policy_version == 0
    assert llm.options["kv_cache_memory_bytes"] == 2**29 and llm.options["enforce_eager"]
    assert "enable_sleep_mode" not in llm.options


def test_responses_come_back_in_the_order_of_their_prompts(start: Any) -> None:
    engine, llm = start()
    rollouts = generate(engine)
    assert [rollout.prompt for rollout in rollouts] == PROMPTS
    assert rollouts[0].token_ids == (9, 9) and rollouts[0].logprobs == (-0.5, -0.5)
    params = llm.params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.7, 0.9, 0, 2)
    assert params.stop_token_ids == [0, 2] and params.seed is None  # a seed raises in vLLM's CPU build
    assert params.output_kind.name == "FINAL_ONLY" and params.flat_logprobs, "nobody looks at the steps"


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"max_num_seqs": 3}, [1, 3, 0, 2]),
        ({"max_num_seqs": 4}, [0, 1, 2, 3]),
        ({"max_num_seqs": 3, "longest_first": False}, [0, 1, 2, 3]),
    ],
)
def test_where_some_must_wait_the_longest_prompts_go_first(
    start: Any, options: dict[str, Any], places: list[int]
) -> None:
    """And equal ones in the caller's order, which is the order of what comes back."""
    engine, llm = start(**options)
    asked = [Prompt(Question(f"q{i}", "", ""), (10 + i,) * length) for i, length in enumerate((2, 5, 2, 5))]
    llm.on_step = lambda: [finished(llm.waiting[0], [20 + int(llm.waiting.pop(0)), 9])]
    rollouts = engine.generate(asked, Sampling(1.0, 1.0, 2), 0, 0)
    assert [tokens[0] - 10 for tokens, _ in llm.asked] == places
    assert [(rollout.prompt, rollout.token_ids) for rollout in rollouts] == [
        (prompt, (20 + i, 9)) for i, prompt in enumerate(asked)
    ]


def test_a_step_that_raises_is_the_engines_death(start: Any) -> None:
    engine, llm = start()

    def die() -> list[Any]:
        if len(llm.waiting) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [finished(llm.waiting.pop(), [9, 9])]

    llm.on_step = die
    with pytest.raises(EngineError, match="died with 2 of 4 responses finished") as caught:
        generate(engine)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(EngineError, match="holds None"):
        engine.generate(PROMPTS, Sampling(1.0, 1.0, 2), 0, 0)


def test_tokens_are_handed_out_step_by_step_and_a_taker_that_fails_leaves_no_engine(start: Any) -> None:
    engine, llm = start()
    handed: list[tuple[dict[int, TokenChunk], int]] = []

    def step() -> list[Any]:
        news = [finished(request, [10 + int(request)], None) for request in llm.waiting[:-1]]
        return [*news, finished(llm.waiting.pop(), [8, 9])]

    def take(pieces: dict[int, TokenChunk]) -> None:
        handed.append((pieces, len(llm.waiting)))
        if len(handed) == 3:
            raise OSError("No space left on device")

    llm.on_step = step
    with pytest.raises(OSError, match="No space left"):  # not "vLLM died"
        engine.generate(PROMPTS, Sampling(1.0, 1.0, 4), 0, 0, take)
    ends, goes_on = TokenChunk((8, 9), (-0.5, -0.5)), [TokenChunk((10 + place,), (-0.5,)) for place in range(4)]
    assert [waiting for _, waiting in handed] == [3, 2, 1]
    assert llm.params.output_kind.name == "DELTA" and not llm.params.flat_logprobs
    assert [pieces for pieces, _ in handed] == [{**dict(enumerate(goes_on[:end])), end: ends} for end in (3, 2, 1)]
    with pytest.raises(EngineError, match="holds None"):
        engine.generate(PROMPTS, Sampling(1.0, 1.0, 4), 0, 0)


def test_what_was_begun_is_prompt_and_only_the_rest_is_asked_for(start: Any) -> None:
    """Of four responses one is at its end by its last token, one by the limit, one has a token and one none."""
    engine, llm = start()
    partials = [
        TokenChunk((7, 2), (-1.0, -2.0)),
        TokenChunk((7,), (-3.0,)),
        TokenChunk((7, 8, 9), (-4.0, -5.0, -6.0)),
        TokenChunk(),
    ]

    def step() -> list[Any]:
        llm.waiting.clear()
        return [finished("0", [9, 2], "stop"), finished("1", [9, 9, 2], "stop")]

    llm.on_step = step
    steps: list[dict[int, TokenChunk]] = []
    rollouts = engine.generate(PROMPTS, Sampling(1.0, 1.0, 3), 0, 0, steps.append, partials)
    assert llm.asked == [([5, 6, 7, 7], 2), ([5, 6, 7], 3)]
    assert [rollout.prompt for rollout in rollouts] == PROMPTS
    assert [rollout.token_ids for rollout in rollouts] == [(7, 2), (7, 9, 2), (7, 8, 9), (9, 9, 2)]
    assert [rollout.finish_reason for rollout in rollouts] == ["stop", "stop", "length", "stop"]
    assert rollouts[1].logprobs == (-3.0, -0.5, -0.5) and rollouts[2].logprobs == partials[2].logprobs
    assert list(steps[0]) == [1, 3] and len(steps) == 1


def test_a_call_without_a_token_left_to_draw_asks_nothing(start: Any) -> None:
    engine, llm = start()
    partials = [TokenChunk((7, 2), (-1.0, -2.0))] * 4
    rollouts = engine.generate(PROMPTS, Sampling(1.0, 1.0, 3), 0, 0, partials=partials)
    assert llm.asked == [] and [rollout.token_ids for rollout in rollouts] == [(7, 2)] * 4


def test_the_deadline_ends_a_slow_call_and_tells_how_far_it_came(start: Any) -> None:
    engine, llm = start(deadline_seconds=0.2)

    def crawl() -> list[Any]:
        time.sleep(0.07)
        return [finished(llm.waiting.pop(), [9, 9])] if len(llm.waiting) > 3 else []

    llm.on_step = crawl
    with pytest.raises(EngineError, match=r"finished 1 of 4 responses in deadline_seconds 0\.2"):
        generate(engine)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: [], "returned 0 of 4 responses"),
        (lambda: [finished("0", [9, 9]), finished("0", [9, 9])], "continued request 0"),
        (lambda: [finished(str(i), []) for i in range(4)], "broken response to question 'q0': 0 tokens"),
        (lambda: [finished(str(i), [9]) for i in range(4)], "broken response to question 'q0': 1 tokens"),
        (lambda: [finished(str(i), [2, 9]) for i in range(4)], None),
        (lambda: [finished(str(i), [9, 9], "abort") for i in range(4)], "aborted request 0"),
    ],
)
def test_what_is_not_a_response_is_an_error(start: Any, step: Callable[[], list[Any]], message: str | None) -> None:
    engine, llm = start()

    def once() -> list[Any]:
        llm.waiting.clear()
        return step()

    llm.on_step = once
    if message is None:
        assert [rollout.finish_reason for rollout in generate(engine)] == ["length"] * 4
    else:
        with pytest.raises(EngineError, match=message):
            generate(engine)


def test_a_warm_up_takes_both_ways_of_the_sampler_and_leaves_the_engine_as_it_was(start: Any) -> None:
    engine, llm = start(max_num_seqs=3)
    ways: list[tuple[int, float]] = []

    def step() -> list[Any]:
        ways.append((len(llm.waiting), llm.params.top_p))
        return [finished(llm.waiting.pop(0), [9, 9]) for _ in range(3)]

    llm.on_step = step
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    engine.warm_up()
    assert torch.rand(2).tolist() == expected and ways == [(3, 1.0), (3, 0.9)] and engine.policy_version == 0
    assert {(len(tokens), new) for tokens, new in llm.asked} == {(16, 2)}
    llm.on_step = None
    assert [rollout.token_ids for rollout in generate(engine)] == [(9, 9)] * 4


def test_an_engine_that_dies_as_it_warms_up_is_dead(start: Any) -> None:
    engine, llm = start()
    llm.on_step = lambda: []
    llm.has_unfinished_requests = lambda: False
    with pytest.raises(EngineError, match="returned 0 of 16 responses"):
        engine.warm_up()
    assert engine.policy_version is None


def test_prefixes_of_older_weights_must_go(start: Any) -> None:
    engine, llm = start()
    llm.can_reset = False
    with pytest.raises(EngineError, match="reset its prefix cache"):
        engine.sync(list(llm.model.named_parameters()), 1)
    assert engine.policy_version is None


def test_a_hang_in_native_code_ends_the_process_with_its_stacks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def native_call_that_hangs() -> None:
        time.sleep(60)

    monkeypatch.setattr(vllm, "_GRACE_SECONDS", 0.1)
    engine = VLLMEngine(deadline_seconds=0.1)
    engine._runs_eagerly = False
    child = os.fork()
    if not child:
        with engine._guarded():
            pass
        time.sleep(0.4)  # the watchdog of a call that returned stays quiet
        os.write(1, b"alive\n")
        with engine._guarded():
            native_call_that_hangs()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    out, err = capfd.readouterr()
    assert out == "alive\n" and "native_call_that_hangs" in err


def test_without_vllm_the_error_names_the_extras(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VLLMEngine()
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(vllm.vllm_patches, "environment_variables", lambda tensor_parallel_size: {})
    extras = r'pip install "sdzero\[cpu\]".*pip install "sdzero\[cuda\]"'
    with pytest.raises(ModuleNotFoundError, match=extras):  # before any weight is loaded
        VLLMEngine()
    with pytest.raises(ModuleNotFoundError, match=extras):
        engine.start(EngineSpec(model_path, 64), PromptBuilder.from_pretrained(model_path))


@pytest.mark.parametrize(("on_cpu", "key"), [(True, "kv_cache_gib 1.0"), (False, "gpu_memory_utilization 0.4")])
def test_a_refused_start_names_our_keys(start: Any, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, key: str) -> None:
    def refuse(self: FakeLLM, **options: Any) -> None:
        raise ValueError("No available memory for the cache blocks.")

    monkeypatch.setattr(FakeLLM, "__init__", refuse)
    with pytest.raises(ValueError, match=rf"{key} and a longest prompt \+ response of 64.*No available memory"):
        start(on_cpu=on_cpu)


def test_tensor_parallel_engines_need_a_process_per_gpu(model_path: str) -> None:
    engine = VLLMEngine(tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"tensor_parallel_size 2 must divide the number of processes, which is 1"):
        engine.start(EngineSpec(model_path, 64), PromptBuilder.from_pretrained(model_path))


def test_importing_the_engines_brings_neither_vllm_nor_torch() -> None:
    code = "import sys, sdzero.engines; print([m for m in ('vllm', 'torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "[]\n"
