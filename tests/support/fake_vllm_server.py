"""HTTP server that answers as a vLLM 0.32 server does, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sdzero.engines import RemoteVLLMEngine

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
GENERATE = "/inference/v1/generate"
Start = Callable[..., RemoteVLLMEngine]


class FakeServer(ThreadingHTTPServer):
    """Answers every request with tokens 20 21 22.

    Attributes:
        faults: path -> function of the request's body that answers in its place with (status, body).
        calls: path and body of each request.
        num_reloads: number of weight reloads; the digest of the one weight that the server shows.
    """

    request_queue_size = 64
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.paths: tuple[str, ...] = PATHS
        self.config, self.version = json.loads(json.dumps(CONFIG)), "default"
        self.faults: dict[str, Callable[[Any], tuple[int, Any]]] = {}
        self.calls: list[tuple[str, Any]] = []
        self.num_reloads = 0

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append((path, body))
        path = path.partition("?")[0]
        if path in self.faults:
            return self.faults[path](body)
        if path == "/collective_rpc":
            self.num_reloads += 1
        if path == "/update_weight_version":
            self.version = body["new_version"]
        answers = {
            "/openapi.json": {"paths": {path: {} for path in self.paths}},
            "/version": {"version": "0.32.0"},
            "/server_info": {"vllm_config": self.config},
            "/get_world_size": {"world_size": 1},
            "/reset_prefix_cache": {"success": True},
            "/weight_checker": {"checksums": {"dp0:pp0:pcp0:tp0:model.qkv.weight": str(self.num_reloads)}},
            "/weight_info": {"weight_version": self.version},
            GENERATE: self.response(),
        }
        return 200, answers.get(path, {})

    def response(self, **changes: Any) -> Any:
        """Return a generated response, with `changes` of its one choice."""
        ids = [20, 21, 22]
        choice = {
            "finish_reason": "length",
            "token_ids": ids,
            "weight_versions": [{"version": self.version, "start": 0, "end": 3}],
            "logprobs": {"content": [{"token_id": i, "logprob": -float(i)} for i in ids]},
        }
        return {"choices": [choice | changes]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        status, answer = self.server.answer(self.path, body)
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass
