"""Real vLLM server on the CPU, for tests of the remote engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_MODEL_LEN = 512
OPTIONS = (  # docs/vllm_server.md explains them
    *("--dtype", "float32", "--logprobs-mode", "raw_logprobs", "--generation-config", "vllm"),
    *("--enable-scale-out", "--skip-tokenizer-init", "--no-enable-chunked-prefill"),
    *("--worker-extension-cls", "sdzero.engines.remote.worker.RepackHeads"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "50000000"),
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def vllm_server(model: str, log: Path) -> Iterator[str]:
    """Start a server and yield its URL; it and its workers end with the block. `log` receives its output.

    The command `vllm` does not start under the CPU build of another name, the module behind it does.
    """
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(MAX_MODEL_LEN), *OPTIONS]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
