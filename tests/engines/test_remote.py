"""Requests of RemoteVLLMEngine to a vLLM server, their order, and faults. A real server: test_remote_server.py."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from sdzero.engines import RemoteVLLMEngine
from sdzero.engines.base import EngineDied, EngineError, EngineSpec
from sdzero.engines.remote.weight_transfer import nccl_source
from sdzero.engines.sync_check import WeightLayout
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Sampling
from support.fake_vllm_server import GENERATE, FakeServer, Start
from support.ranks.forked import forked
from support.tiny_model import write_tiny_model

SAMPLING = Sampling(0.7, 0.9, 3)
Weights = dict[str, torch.Tensor]


@pytest.fixture
def weights(path: Path) -> Weights:
    layout = WeightLayout.of_pretrained(str(path))
    return {name: torch.ones(layout.shapes[name]) for name in layout.shapes if name in layout.required}


@pytest.fixture
def engine(start: Start, weights: Weights) -> RemoteVLLMEngine:
    """An engine that has sent its weights as version 1."""
    engine = start()
    engine.sync(weights.items(), 1)
    return engine


def prompts(count: int) -> list[Prompt]:
    return [Prompt(Question(f"q{i}", "", ""), (5, 6, 7 + i)) for i in range(count)]


# --- refusals at the start ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "urls is empty"),
        (["node7:8000"], "'node7:8000' does not start with http://"),
        (["http://a", "http://b"], "several servers: set folder"),
    ],
)
def test_wrong_urls_are_refused(urls: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemoteVLLMEngine(urls)


def test_a_server_that_is_down_is_waited_for_and_refused(start: Start) -> None:
    before = threading.active_count()
    with pytest.raises(EngineError, match=r"no vLLM server at http://127.0.0.1:9 after 0.3 seconds: start one"):
        start("http://127.0.0.1:9")
    assert threading.active_count() == before


def test_a_server_without_the_interfaces_is_refused_with_the_options_for_them(server: FakeServer, start: Start) -> None:
    server.paths = ("/health", "/v1/completions")
    with pytest.raises(ValueError, match=r"version 0\.32\.0") as refused:
        start()
    for named in (GENERATE, "/weight_info", "--enable-scale-out", "VLLM_SERVER_DEV_MODE=1"):
        assert named in str(refused.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "option"),
    [
        ("model_config", "logprobs_mode", "processed_logprobs", "--logprobs-mode raw_logprobs"),
        ("model_config", "max_model_len", 63, "--max-model-len 64"),
        ("model_config", "dtype", "torch.bfloat16", "--dtype float32"),
        ("device_config", "device", "cpu", "--no-enable-chunked-prefill --worker-extension-cls sdzero.engines.remote"),
    ],
)
def test_a_server_with_other_settings_is_refused_with_the_option(
    server: FakeServer, start: Start, section: str, key: str, value: Any, option: str
) -> None:
    start()
    server.config[section][key] = value
    with pytest.raises(ValueError, match=f"Start it with: {option}"):
        start()


def test_without_a_folder_the_server_must_take_weights_by_nccl(server: FakeServer, start: Start) -> None:
    with pytest.raises(ValueError, match=r"--weight-transfer-config '{\"backend\": \"nccl\"}'"):
        start(folder=None)
    server.config["weight_transfer_config"] = {"backend": "nccl"}
    start(folder=None)


# --- weights --------------------------------------------------------------------------------------


def test_a_sync_pauses_reloads_checks_and_labels(
    engine: RemoteVLLMEngine, server: FakeServer, weights: Weights
) -> None:
    server.calls.clear()
    report = engine.sync(weights.items(), 7)
    assert [path for path, _ in server.calls] == [
        *("/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/weight_checker", "/update_weight_version"),
        *("/resume", "/weight_info"),
    ]
    assert server.version == f"7-{report.checksum}"
    reload = dict(server.calls)["/collective_rpc"]
    assert reload["method"] == "reload_weights" and not Path(reload["kwargs"]["weights_path"]).exists()


OTHER_DIGEST = {"checksums": {"dp0:pp0:pcp0:tp0:model.norm.weight": "x"}}


@pytest.mark.parametrize(
    ("path_of_fault", "answer", "message"),
    [
        ("/collective_rpc", (500, {"error": {"message": "out of memory"}}), "with 500: .*out of memory"),
        ("/reset_prefix_cache", (200, {"success": False}), "could not reset its prefix cache"),
        ("/weight_info", (200, {"weight_version": "6-other"}), "holds weights 6-other, not 7-"),
        ("/weight_checker", (200, OTHER_DIGEST), "norm.weight' .*differs"),
    ],
)
def test_after_a_failed_sync_the_engine_refuses_and_the_server_runs(
    start: Start, server: FakeServer, weights: Weights, path_of_fault: str, answer: tuple[int, Any], message: str
) -> None:
    engine = start()
    server.faults[path_of_fault] = lambda body: answer
    with pytest.raises(EngineError, match=f"weights of policy version 7 did not reach the vLLM server.*{message}"):
        engine.sync(weights.items(), 7)
    assert engine.policy_version is None
    assert "/resume" in dict(server.calls)
    server.faults.clear()
    engine.sync(weights.items(), 8)


def test_a_folder_that_cannot_be_written_fails_the_sync_after_all_weights_are_gathered(
    start: Start, weights: Weights, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    remaining = iter(weights.items())
    with pytest.raises(EngineError, match="did not reach the vLLM server. FileExistsError: "):
        start(folder=tmp_path / "file").sync(remaining, 1)
    assert next(remaining, None) is None, "other ranks gather with this one"


def test_weights_that_do_not_change_with_the_trainers_are_stale(
    engine: RemoteVLLMEngine, server: FakeServer, weights: Weights
) -> None:
    """Fused weights can only be compared with those before the sync."""
    server.faults["/collective_rpc"] = lambda body: (200, {"results": [None]})
    engine.sync(weights.items(), 2)  # the same weights: nothing has to change
    with pytest.raises(EngineError, match="still holds the weights of the previous sync"):
        engine.sync({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}.items(), 3)


@pytest.mark.parametrize("tied", [True, False])
def test_nccl_gets_what_its_metadata_announces(tmp_path: Path, tied: bool) -> None:
    """By vLLM's own check of what a trainer sends: a disagreement would hang both sides. No NCCL here: no GPU."""
    sender = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine").NCCLTrainerWeightTransferEngine
    folder = write_tiny_model(tmp_path, tie_word_embeddings=tied)
    source = nccl_source(WeightLayout.of_pretrained(str(folder)), torch.device("cpu"), torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    source.weights = model.named_parameters()
    sent = dict(sender._checked_iter(source, source.metadata()))
    assert all(torch.equal(sent[name], weight.bfloat16()) for name, weight in model.named_parameters())


def test_a_start_with_weights_sends_those_of_the_folder(server: FakeServer, start: Start) -> None:
    """A server may hold those of another stage."""
    engine = start(load_weights=True)
    assert engine.policy_version == 0 and server.num_reloads == 1
    assert engine.generate(prompts(1), SAMPLING, 0, 0)[0].policy_version == 0


def test_all_ranks_receive_a_failed_sync_and_share_the_servers(
    servers: Callable[[], FakeServer], path: Path, builder: PromptBuilder, weights: Weights, tmp_path: Path
) -> None:
    """Two real ranks, two servers: rank 0 alone sends, to both; each rank samples from its own."""
    both = [servers(), servers()]

    def work(rank: int) -> None:
        dist.init_process_group("gloo", rank=rank, world_size=2)
        engine = RemoteVLLMEngine([server.url for server in both], tmp_path)
        engine.start(EngineSpec(str(path), 64), builder)
        consumed: list[str] = []
        engine.sync((consumed.append(name) or (name, tensor) for name, tensor in weights.items()), 1)
        assert len(consumed) == len(weights)
        [rollout] = engine.generate([prompts(2)[rank]], SAMPLING, 0, 1)
        assert rollout.policy_version == 1
        with pytest.raises(EngineError, match="'model.norm.weight' was not sent"):
            engine.sync(((n, w) for n, w in weights.items() if n != "model.norm.weight"), 2)
        assert engine.policy_version is None
        engine.close()
        dist.destroy_process_group()

    assert forked(2, tmp_path / "rank", work) == [0, 0], (tmp_path / "rank0.log").read_text()[-2000:]
    for rank, server in enumerate(both):
        sent = [body for called, body in server.calls if called == GENERATE]
        assert [body["token_ids"] for body in sent] == [[5, 6, 7 + rank]] and server.num_reloads == 2


# --- sampling -------------------------------------------------------------------------------------


def test_each_response_has_its_own_seed(engine: RemoteVLLMEngine, server: FakeServer, builder: PromptBuilder) -> None:
    def requests() -> list[tuple[list[int], int]]:
        server.calls.clear()
        rollouts = engine.generate([*prompts(3), prompts(1)[0]], SAMPLING, 11, 1)
        assert [rollout.logprobs for rollout in rollouts] == [(-20.0, -21.0, -22.0)] * 4
        return sorted((body["token_ids"], body["sampling_params"]["seed"]) for _, body in server.calls)

    sent = requests()
    assert len({seed for _, seed in sent}) == 4, "a repeated prompt must not give the same response"
    for p in (body["sampling_params"] for _, body in server.calls):
        assert (p["temperature"], p["top_p"], p["max_tokens"], p["top_k"]) == (0.7, 0.9, 3, 0)
        assert p["stop_token_ids"] == sorted(builder.end_ids) and p["ignore_eos"] and p["logprobs"] == 0
    assert requests() == sent, "a repeated call repeats the seeds"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": "abort"}, r"vLLM aborted question 'q0': \['abort'\]"),
        ({"token_ids": [20, 21]}, "broken response to question 'q0': 2 tokens of at most 3, 3 log-prob"),
        ({"token_ids": []}, "broken response to question 'q0': 0 tokens"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 3}]}, r"sampled from weights \['default'\]"),
    ],
)
def test_a_broken_response_is_an_error(
    engine: RemoteVLLMEngine, server: FakeServer, changes: dict[str, Any], message: str
) -> None:
    server.faults[GENERATE] = lambda body: (200, server.response(**changes))
    with pytest.raises(EngineDied, match=message):
        engine.generate(prompts(1), SAMPLING, 0, 1)


def test_a_server_that_fails_refuses_or_dies(engine: RemoteVLLMEngine, server: FakeServer) -> None:
    server.faults[GENERATE] = lambda body: (500, "EngineDeadError")
    with pytest.raises(EngineDied, match="with 500: .*EngineDeadError"):
        engine.generate(prompts(9), SAMPLING, 0, 1)
    server.faults[GENERATE] = lambda body: (400, "no such parameter")
    with pytest.raises(EngineError, match="with 400: .*no such parameter") as refused:
        engine.generate(prompts(9), SAMPLING, 0, 1)
    assert not isinstance(refused.value, EngineDied), "a repetition would not help"
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineDied, match="does not answer POST .* Is it running"):
        engine.generate(prompts(9), SAMPLING, 0, 1)


def test_a_fault_cancels_the_other_requests(engine: RemoteVLLMEngine, server: FakeServer) -> None:
    """They would delay the next sync, which waits for running requests."""
    gate = threading.Event()
    server.faults[GENERATE] = lambda body: (500 if body["token_ids"] == [5, 6, 9] else gate.wait(20), "")
    with pytest.raises(EngineDied, match="with 500"):
        engine.generate(prompts(3), SAMPLING, 0, 1)
    deadline = time.monotonic() + 5
    while (running := asyncio.all_tasks(engine._client._loop)) and time.monotonic() < deadline:
        time.sleep(0.01)
    gate.set()
    assert not running


def test_a_call_ends_at_its_deadline_or_when_the_engine_is_closed(engine: RemoteVLLMEngine, server: FakeServer) -> None:
    gate = threading.Event()
    server.faults[GENERATE] = lambda body: (200, gate.wait(20))
    engine.deadline_seconds = 0.5
    with pytest.raises(EngineDied, match=r"did not finish .*generate in 0\.5 seconds"):
        engine.generate(prompts(3), SAMPLING, 0, 1)
    engine.deadline_seconds, faults = 60, list[EngineError]()

    def generate() -> None:
        with pytest.raises(EngineError, match="was cancelled: the engine was closed") as cancelled:
            engine.generate(prompts(3), SAMPLING, 0, 1)
        faults.append(cancelled.value)

    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(0.2)
    engine.close()
    thread.join(10)
    gate.set()
    assert len(faults) == 1
