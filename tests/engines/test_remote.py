"""What the engine asks of a vLLM server, in which order, and what it makes of faults. A real one: test_engines.py."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
from support.ranks.forked import forked
from support.tiny_model import write_tiny_model

SAMPLING = Sampling(0.7, 0.9, 3)
CONFIG: dict[str, Any] = {
    "model_config": {"logprobs_mode": "raw_logprobs", "max_model_len": 64, "dtype": "torch.float32"},
    "weight_transfer_config": None,
    "device_config": {"device": "cuda"},
    "scheduler_config": {"enable_chunked_prefill": True},
    "parallel_config": {"worker_extension_cls": ""},
}
PATHS = (
    *("/inference/v1/generate", "/server_info", "/collective_rpc", "/reset_prefix_cache", "/pause", "/resume"),
    *("/is_paused", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"),
    *("/finish_weight_update", "/update_weight_version", "/weight_info", "/weight_checker", "/get_world_size"),
)


class FakeServer(ThreadingHTTPServer):
    """Answers as vLLM 0.32 does; `faults` maps a path to a function of the request that answers in its place."""

    request_queue_size = 64
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.paths: tuple[str, ...] = PATHS
        self.config, self.version = json.loads(json.dumps(CONFIG)), "default"
        self.faults: dict[str, Callable[[Any], tuple[int, Any]]] = {}
        self.calls: list[tuple[str, Any]] = []
        self.digests = {"dp0:pp0:pcp0:tp0:model.qkv.weight": "0"}
        self.num_reloads = 0

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append((path, body))
        path = path.partition("?")[0]
        if path in self.faults:
            return self.faults[path](body)
        return 200, getattr(self, "on" + path.replace("/", "_"), lambda body: {})(body)

    def on_openapi_json(self, body: Any) -> Any:
        return {"paths": {path: {} for path in self.paths}}

    def on_version(self, body: Any) -> Any:
        return {"version": "0.32.0"}

    def on_server_info(self, body: Any) -> Any:
        return {"vllm_config": self.config}

    def on_get_world_size(self, body: Any) -> Any:
        return {"world_size": 1}

    def on_reset_prefix_cache(self, body: Any) -> Any:
        return {"success": True}

    def on_collective_rpc(self, body: Any) -> Any:
        self.num_reloads += 1
        self.digests["dp0:pp0:pcp0:tp0:model.qkv.weight"] = str(self.num_reloads)
        return {"results": [None]}

    def on_weight_checker(self, body: Any) -> Any:
        return {"checksums": self.digests}

    def on_update_weight_version(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True}

    def on_weight_info(self, body: Any) -> Any:
        return {"weight_version": self.version}

    def on_inference_v1_generate(self, body: Any) -> Any:
        ids = [20, 21, 22]
        return {
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "length",
                    "token_ids": ids,
                    "weight_versions": [{"version": self.version, "start": 0, "end": 3}],
                    "logprobs": {"content": [{"token_id": i, "logprob": -float(i)} for i in ids]},
                }
            ]
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        path = self.path.replace("/openapi.json", "/openapi_json")
        status, answer = self.server.answer(path, body)
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def builder(path: str) -> PromptBuilder:
    return PromptBuilder.from_pretrained(path)


@pytest.fixture
def servers() -> Iterator[Callable[[], FakeServer]]:
    running: list[FakeServer] = []

    def start() -> FakeServer:
        running.append(FakeServer())
        threading.Thread(target=running[-1].serve_forever, args=(0.01,), daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(servers: Callable[[], FakeServer]) -> FakeServer:
    return servers()


@pytest.fixture
def engine(server: FakeServer, path: str, builder: PromptBuilder, tmp_path: Path) -> Iterator[RemoteVLLMEngine]:
    engine = RemoteVLLMEngine([server.url + "/"], tmp_path / "weights", deadline_seconds=5, start_seconds=2)
    engine.start(EngineSpec(path, 64), builder)
    yield engine
    engine.close()


@pytest.fixture
def weights(path: str) -> dict[str, torch.Tensor]:
    layout = WeightLayout.of_pretrained(path)
    return {name: torch.ones(layout.shapes[name]) for name in layout.shapes if name in layout.required}


def prompts(count: int) -> list[Prompt]:
    return [Prompt(Question(f"q{i}", "", ""), (5, 6, 7 + i)) for i in range(count)]


def start(urls: list[str], path: str, builder: PromptBuilder, folder: Path | None = Path("/dev/shm")) -> None:
    """To see it refused. What closes an engine closes one too that never started."""
    engine = RemoteVLLMEngine(urls, folder, start_seconds=0.3)
    try:
        engine.start(EngineSpec(path, 64), builder)
    finally:
        engine.close()


# --- refusals at the start ------------------------------------------------------------------------


def test_arguments_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(ValueError, match="urls is empty"):
        RemoteVLLMEngine([])
    with pytest.raises(ValueError, match="'node7:8000' does not start with http://"):
        RemoteVLLMEngine(["node7:8000"])
    with pytest.raises(ValueError, match="several servers: set folder"):
        RemoteVLLMEngine(["http://a", "http://b"])


def test_a_server_that_is_not_there_is_waited_for_and_refused(path: str, builder: PromptBuilder) -> None:
    before = threading.active_count()
    with pytest.raises(EngineError, match=r"no vLLM server at http://127.0.0.1:9 after 0.3 seconds: start one"):
        start(["http://127.0.0.1:9"], path, builder)
    assert threading.active_count() == before


def test_a_server_without_the_interfaces_is_refused_with_the_options_that_bring_them(
    server: FakeServer, path: str, builder: PromptBuilder
) -> None:
    server.paths = ("/health", "/v1/completions")
    with pytest.raises(ValueError, match=r"version 0\.32\.0") as refused:
        start([server.url], path, builder)
    for said in ("/inference/v1/generate", "/weight_info", "--enable-scale-out", "VLLM_SERVER_DEV_MODE=1"):
        assert said in str(refused.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "option"),
    [
        ("model_config", "logprobs_mode", "processed_logprobs", "--logprobs-mode raw_logprobs"),
        ("model_config", "max_model_len", 63, "--max-model-len 64"),
        ("model_config", "dtype", "torch.bfloat16", "--dtype float32"),
        ("device_config", "device", "cpu", "--no-enable-chunked-prefill --worker-extension-cls sdzero.engines.remote"),
    ],
)
def test_a_server_started_otherwise_is_refused_with_the_option(
    server: FakeServer, path: str, builder: PromptBuilder, section: str, key: str, value: Any, option: str
) -> None:
    start([server.url], path, builder)
    server.config[section][key] = value
    with pytest.raises(ValueError, match=f"Start it with: {option}"):
        start([server.url], path, builder)


def test_without_a_folder_the_server_must_take_weights_by_nccl(
    server: FakeServer, path: str, builder: PromptBuilder
) -> None:
    with pytest.raises(ValueError, match=r"--weight-transfer-config '{\"backend\": \"nccl\"}'"):
        start([server.url], path, builder, folder=None)
    server.config["weight_transfer_config"] = {"backend": "nccl"}
    start([server.url], path, builder, folder=None)


# --- weights --------------------------------------------------------------------------------------


def test_a_sync_pauses_reloads_checks_and_names(
    engine: RemoteVLLMEngine, server: FakeServer, weights: dict[str, torch.Tensor]
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


@pytest.mark.parametrize(
    ("where", "answer", "message"),
    [
        ("/collective_rpc", (500, {"error": {"message": "out of memory"}}), "with 500: .*out of memory"),
        ("/reset_prefix_cache", (200, {"success": False}), "could not reset its prefix cache"),
        ("/weight_info", (200, {"weight_version": "6-other"}), "holds weights 6-other, not 7-"),
        (
            "/weight_checker",
            (200, {"checksums": {"dp0:pp0:pcp0:tp0:model.norm.weight": "x"}}),
            "norm.weight' .*differs",
        ),
    ],
)
def test_a_sync_that_fails_leaves_an_engine_that_refuses_and_a_server_that_runs(
    engine: RemoteVLLMEngine,
    server: FakeServer,
    weights: dict[str, torch.Tensor],
    where: str,
    answer: tuple[int, Any],
    message: str,
) -> None:
    server.faults[where] = lambda body: answer
    with pytest.raises(EngineError, match=f"weights of policy version 7 did not reach the vLLM server.*{message}"):
        engine.sync(weights.items(), 7)
    assert engine.policy_version is None
    assert "/resume" in dict(server.calls)
    server.faults.clear()
    engine.sync(weights.items(), 8)


def test_a_folder_that_cannot_be_written_fails_the_sync_once_all_weights_are_gathered(
    server: FakeServer, path: str, builder: PromptBuilder, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    engine = RemoteVLLMEngine([server.url], tmp_path / "file")
    engine.start(EngineSpec(path, 64), builder)
    consumed: list[str] = []
    with pytest.raises(EngineError, match="did not reach the vLLM server. FileExistsError: "):
        engine.sync((consumed.append(name) or (name, tensor) for name, tensor in weights.items()), 1)
    assert len(consumed) == len(weights), "other ranks gather with this one"
    engine.close()


def test_weights_that_do_not_change_with_the_trainers_are_stale(
    engine: RemoteVLLMEngine, server: FakeServer, weights: dict[str, torch.Tensor]
) -> None:
    """Of fused weights nothing can be compared but that they are others than before."""
    engine.sync(weights.items(), 1)
    server.faults["/collective_rpc"] = lambda body: (200, {"results": [None]})
    engine.sync(weights.items(), 2)  # the same weights: nothing has to change
    with pytest.raises(EngineError, match="still holds the weights of the previous sync"):
        engine.sync({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}.items(), 3)


@pytest.mark.parametrize("tied", [True, False])
def test_nccl_gets_what_it_is_told_to_expect(tmp_path: Path, tied: bool) -> None:
    """By vLLM's own check of what a trainer sends: a disagreement would hang both sides. No NCCL here: no GPU."""
    sender = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine").NCCLTrainerWeightTransferEngine
    folder = write_tiny_model(tmp_path, tie_word_embeddings=tied)
    source = nccl_source(WeightLayout.of_pretrained(str(folder)), torch.device("cpu"), torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    source.weights = model.named_parameters()
    sent = dict(sender._checked_iter(source, source.metadata()))
    assert all(torch.equal(sent[name], weight.bfloat16()) for name, weight in model.named_parameters())


def test_a_start_with_weights_sends_those_of_the_folder(
    server: FakeServer, path: str, builder: PromptBuilder, tmp_path: Path
) -> None:
    """A server may hold what another stage left there."""
    engine = RemoteVLLMEngine([server.url], tmp_path)
    engine.start(EngineSpec(path, 64, load_weights=True), builder)
    assert engine.policy_version == 0 and server.num_reloads == 1
    assert engine.generate(prompts(1), SAMPLING, 0, 0)[0].policy_version == 0
    engine.close()


def test_all_ranks_learn_of_a_failed_sync_and_take_turns(
    servers: Callable[[], FakeServer], path: str, builder: PromptBuilder, weights: dict[str, Any], tmp_path: Path
) -> None:
    """Two real ranks, two servers: rank 0 alone sends, to both; each rank asks its own."""
    both = [servers(), servers()]

    def work(rank: int) -> None:
        dist.init_process_group("gloo", rank=rank, world_size=2)
        engine = RemoteVLLMEngine([server.url for server in both], tmp_path)
        engine.start(EngineSpec(path, 64), builder)
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
        asked = [body for called, body in server.calls if called == "/inference/v1/generate"]
        assert [body["token_ids"] for body in asked] == [[5, 6, 7 + rank]] and server.num_reloads == 2


# --- sampling -------------------------------------------------------------------------------------


def test_each_response_is_asked_for_with_a_seed_of_its_own(
    engine: RemoteVLLMEngine, server: FakeServer, weights: dict[str, torch.Tensor], builder: PromptBuilder
) -> None:
    engine.sync(weights.items(), 1)
    server.calls.clear()
    rollouts = engine.generate([*prompts(3), prompts(1)[0]], SAMPLING, 11, 1)
    assert [rollout.logprobs for rollout in rollouts] == [(-20.0, -21.0, -22.0)] * 4
    params = [body["sampling_params"] for _, body in server.calls]
    assert len({p["seed"] for p in params}) == 4, "one prompt asked twice must not draw one response twice"
    for p in params:
        assert (p["temperature"], p["top_p"], p["max_tokens"], p["top_k"]) == (0.7, 0.9, 3, 0)
        assert p["stop_token_ids"] == sorted(builder.end_ids) and p["ignore_eos"] and p["logprobs"] == 0
    asked = asked_for(server)
    engine.generate([*prompts(3), prompts(1)[0]], SAMPLING, 11, 1)
    assert asked_for(server) == sorted(asked * 2), "and a repeated call repeats them"


def asked_for(server: FakeServer) -> list[tuple[list[int], int]]:
    return sorted((body["token_ids"], body["sampling_params"]["seed"]) for _, body in server.calls)


def altered(server: FakeServer, **changes: Any) -> Callable[[Any], tuple[int, Any]]:
    answer = server.on_inference_v1_generate(None)
    answer["choices"][0] |= changes
    return lambda body: (200, answer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": "abort"}, r"vLLM aborted question 'q0': \['abort'\]"),
        ({"token_ids": [20, 21]}, "broken response to question 'q0': 2 tokens of at most 3, 3 log-prob"),
        ({"token_ids": []}, "broken response to question 'q0': 0 tokens"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 3}]}, r"sampled from weights \['default'\]"),
    ],
)
def test_a_broken_response_is_no_rollout(
    engine: RemoteVLLMEngine,
    server: FakeServer,
    weights: dict[str, torch.Tensor],
    changes: dict[str, Any],
    message: str,
) -> None:
    engine.sync(weights.items(), 1)
    server.faults["/inference/v1/generate"] = altered(server, **changes)
    with pytest.raises(EngineDied, match=message):
        engine.generate(prompts(1), SAMPLING, 0, 1)


def test_a_server_that_fails_refuses_or_dies(
    engine: RemoteVLLMEngine, server: FakeServer, weights: dict[str, torch.Tensor]
) -> None:
    engine.sync(weights.items(), 1)
    server.faults["/inference/v1/generate"] = lambda body: (500, "EngineDeadError")
    with pytest.raises(EngineDied, match="with 500: .*EngineDeadError"):
        engine.generate(prompts(9), SAMPLING, 0, 1)
    server.faults["/inference/v1/generate"] = lambda body: (400, "no such parameter")
    with pytest.raises(EngineError, match="with 400: .*no such parameter") as refused:
        engine.generate(prompts(9), SAMPLING, 0, 1)
    assert not isinstance(refused.value, EngineDied), "asking again would not help"
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineDied, match="does not answer POST .* Is it running"):
        engine.generate(prompts(9), SAMPLING, 0, 1)


def test_one_fault_takes_the_other_requests_back(
    engine: RemoteVLLMEngine, server: FakeServer, weights: dict[str, torch.Tensor]
) -> None:
    """They would hold up the next sync, which waits for what runs."""
    engine.sync(weights.items(), 1)
    gate = threading.Event()
    server.faults["/inference/v1/generate"] = lambda body: (
        500 if body["token_ids"] == [5, 6, 9] else gate.wait(20),
        "",
    )
    with pytest.raises(EngineDied, match="with 500"):
        engine.generate(prompts(3), SAMPLING, 0, 1)
    deadline = time.monotonic() + 5
    while (running := asyncio.all_tasks(engine._client._loop)) and time.monotonic() < deadline:
        time.sleep(0.01)
    gate.set()
    assert not running


def test_a_late_server_is_given_up_and_so_is_one_whose_engine_is_closed(
    server: FakeServer, path: str, builder: PromptBuilder, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    gate = threading.Event()
    server.faults["/inference/v1/generate"] = lambda body: (200, gate.wait(20))
    engine = RemoteVLLMEngine([server.url], tmp_path, deadline_seconds=0.5)
    engine.start(EngineSpec(path, 64), builder)
    engine.sync(weights.items(), 1)
    with pytest.raises(EngineDied, match=r"did not finish .*generate in 0\.5 seconds"):
        engine.generate(prompts(3), SAMPLING, 0, 1)
    engine.deadline_seconds, faults = 60, list[EngineError]()

    def ask() -> None:
        with pytest.raises(EngineError, match="was cancelled: the engine was closed") as given_up:
            engine.generate(prompts(3), SAMPLING, 0, 1)
        faults.append(given_up.value)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    engine.close()
    thread.join(10)
    gate.set()
    assert len(faults) == 1
