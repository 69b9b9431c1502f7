"""VLLMEngine around a fake vLLM: order of calls, failures, deadline, order of requests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdzero.engines import VLLMEngine, vllm
from sdzero.engines.base import EngineError, EngineSpec, TokenChunk
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Sampling
from support.fake_llm import FakeLLM, finished

PROMPTS = [Prompt(Question(f"q{i}", "", ""), (5, 6, 7)) for i in range(4)]


@pytest.fixture
def start(
    path: Path, builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[VLLMEngine, FakeLLM]]:
    """Starts an engine with loaded weights on the fake; `on_cpu` says what the fake vLLM runs on."""

    def start(on_cpu: bool = True, load_weights: bool = True, **options: Any) -> tuple[VLLMEngine, FakeLLM]:
        monkeypatch.setattr(vllm, "_import_vllm", lambda: (FakeLLM, on_cpu))
        monkeypatch.setattr(vllm.vllm_patches, "environment_variables", lambda tensor_parallel_size: {})
        engine = VLLMEngine(**options)
        engine.start(EngineSpec(str(path), 64, load_weights=load_weights), builder)
        return engine, engine._llm

    return start


def generate(engine: VLLMEngine, max_new_tokens: int = 2) -> list[Any]:
    assert engine.policy_version is not None
    return engine.generate(PROMPTS, Sampling(0.7, 0.9, max_new_tokens), 0, engine.policy_version)


@pytest.mark.parametrize("wakes", [True, False])
def test_sleep_and_wake_allocate_weights_before_the_cache(start: Any, wakes: bool) -> None:
    engine, llm = start(on_cpu=False, load_weights=False)
    weights = dict(AutoModelForCausalLM.from_pretrained(llm.options["model"]).named_parameters())
    assert llm.options["enable_sleep_mode"] and llm.options["load_format"] == "dummy"
    assert not llm.options["enforce_eager"]
    engine.sync(weights.items(), 1)
    engine.sleep()
    engine.sleep()  # sleeping twice is sleeping
    with pytest.raises(EngineError, match="holds None"):
        engine.generate(PROMPTS, Sampling(1.0, 1.0, 2), 0, 1)
    if wakes:  # else the sync does
        engine.wake()
    engine.sync(weights.items(), 2)
    engine.generate(PROMPTS, Sampling(1.0, 1.0, 2), 0, 2)
    assert llm.calls == [
        *("reload_weights", "reset_prefix_cache"),
        *("sleep 2", "wake_up ['weights']", "reload_weights", "reset_prefix_cache", "wake_up ['kv_cache']"),
        "reset_prefix_cache",
    ]


def test_sleep_does_nothing_on_the_cpu(start: Any) -> None:
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
    assert params.output_kind.name == "FINAL_ONLY" and params.flat_logprobs, "no callback reads the steps"


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"max_num_seqs": 3}, [1, 3, 0, 2]),
        ({"max_num_seqs": 4}, [0, 1, 2, 3]),
        ({"max_num_seqs": 3, "longest_first": False}, [0, 1, 2, 3]),
    ],
)
def test_the_longest_prompts_are_scheduled_first_if_some_must_wait(
    start: Any, options: dict[str, Any], order: list[int]
) -> None:
    """And equal ones in the caller's order, which is the order of what comes back."""
    engine, llm = start(**options)
    prompts = [Prompt(Question(f"q{i}", "", ""), (10 + i,) * length) for i, length in enumerate((2, 5, 2, 5))]
    llm.on_step = lambda: [finished(llm.waiting[0], [20 + int(llm.waiting.pop(0)), 9])]
    rollouts = engine.generate(prompts, Sampling(1.0, 1.0, 2), 0, 0)
    assert [tokens[0] - 10 for tokens, _ in llm.requests] == order
    assert [(rollout.prompt, rollout.token_ids) for rollout in rollouts] == [
        (prompt, (20 + i, 9)) for i, prompt in enumerate(prompts)
    ]


def test_an_exception_in_a_step_is_a_dead_engine(start: Any) -> None:
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


def test_tokens_are_passed_on_step_by_step_and_a_failing_callback_invalidates_the_engine(start: Any) -> None:
    engine, llm = start()
    seen: list[tuple[dict[int, TokenChunk], int]] = []

    def step() -> list[Any]:
        news = [finished(request, [10 + int(request)], None) for request in llm.waiting[:-1]]
        return [*news, finished(llm.waiting.pop(), [8, 9])]

    def take(pieces: dict[int, TokenChunk]) -> None:
        seen.append((pieces, len(llm.waiting)))
        if len(seen) == 3:
            raise OSError("No space left on device")

    llm.on_step = step
    with pytest.raises(OSError, match="No space left"):  # not "vLLM died"
        engine.generate(PROMPTS, Sampling(1.0, 1.0, 4), 0, 0, take)
    ends, continues = TokenChunk((8, 9), (-0.5, -0.5)), [TokenChunk((10 + place,), (-0.5,)) for place in range(4)]
    assert [waiting for _, waiting in seen] == [3, 2, 1]
    assert llm.params.output_kind.name == "DELTA" and not llm.params.flat_logprobs
    assert [pieces for pieces, _ in seen] == [{**dict(enumerate(continues[:end])), end: ends} for end in (3, 2, 1)]
    with pytest.raises(EngineError, match="holds None"):
        engine.generate(PROMPTS, Sampling(1.0, 1.0, 4), 0, 0)


def test_partial_responses_become_prompts_and_only_the_rest_is_requested(start: Any) -> None:
    """Of four responses one ended by its last token, one by the limit, one has a token and one none."""
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
    assert llm.requests == [([5, 6, 7, 7], 2), ([5, 6, 7], 3)]
    assert [rollout.prompt for rollout in rollouts] == PROMPTS
    assert [rollout.token_ids for rollout in rollouts] == [(7, 2), (7, 9, 2), (7, 8, 9), (9, 9, 2)]
    assert [rollout.finish_reason for rollout in rollouts] == ["stop", "stop", "length", "stop"]
    assert rollouts[1].logprobs == (-3.0, -0.5, -0.5) and rollouts[2].logprobs == partials[2].logprobs
    assert list(steps[0]) == [1, 3] and len(steps) == 1
    llm.requests.clear()
    complete = engine.generate(PROMPTS, Sampling(1.0, 1.0, 3), 0, 0, partials=[partials[0]] * 4)
    assert llm.requests == [] and [rollout.token_ids for rollout in complete] == [(7, 2)] * 4


def test_the_deadline_ends_a_slow_call_with_the_number_of_responses(start: Any) -> None:
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
def test_broken_outputs_are_errors(start: Any, step: Callable[[], list[Any]], message: str | None) -> None:
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


def test_a_warm_up_runs_both_paths_of_the_sampler_and_changes_nothing(start: Any) -> None:
    engine, llm = start(max_num_seqs=3)
    paths: list[tuple[int, float]] = []

    def step() -> list[Any]:
        paths.append((len(llm.waiting), llm.params.top_p))
        return [finished(llm.waiting.pop(0), [9, 9]) for _ in range(3)]

    llm.on_step = step
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    engine.warm_up()
    assert torch.rand(2).tolist() == expected and paths == [(3, 1.0), (3, 0.9)] and engine.policy_version == 0
    assert {(len(tokens), new) for tokens, new in llm.requests} == {(16, 2)}
    llm.on_step = None
    assert [rollout.token_ids for rollout in generate(engine)] == [(9, 9)] * 4


def test_an_engine_may_die_in_its_warm_up(start: Any) -> None:
    engine, llm = start()
    llm.on_step = lambda: []
    llm.has_unfinished_requests = lambda: False
    with pytest.raises(EngineError, match="returned 0 of 16 responses"):
        engine.warm_up()
    assert engine.policy_version is None


def test_cached_prefixes_of_older_weights_are_an_error(start: Any) -> None:
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


def test_without_vllm_the_error_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sdzero\[cpu\]".*pip install "sdzero\[cuda\]"'):
        VLLMEngine()  # before any weight is loaded


@pytest.mark.parametrize(("on_cpu", "key"), [(True, "kv_cache_gib 1.0"), (False, "gpu_memory_utilization 0.4")])
def test_a_failed_start_names_our_keys(start: Any, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, key: str) -> None:
    def refuse(self: FakeLLM, **options: Any) -> None:
        raise ValueError("No available memory for the cache blocks.")

    monkeypatch.setattr(FakeLLM, "__init__", refuse)
    with pytest.raises(ValueError, match=rf"{key} and a longest prompt \+ response of 64.*No available memory"):
        start(on_cpu=on_cpu)


def test_tensor_parallel_engines_need_a_process_per_gpu(path: Path, builder: PromptBuilder) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size 2 must divide the number of processes, which is 1"):
        VLLMEngine(tensor_parallel_size=2).start(EngineSpec(str(path), 64), builder)


def test_importing_the_engines_loads_neither_vllm_nor_torch() -> None:
    code = "import sys, sdzero.engines; print([m for m in ('vllm', 'torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "[]\n"
