"""Check that a vLLM server has the required API and settings, before anything is sent to it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from sdzero.engines.base import EngineError, EngineSpec
from sdzero.engines.remote.client import Client

log = logging.getLogger(__name__)

EXTENSION = "sdzero.engines.remote.worker.RepackHeads"
GENERATE = "/inference/v1/generate"
_DEVELOPMENT = (  # available with VLLM_SERVER_DEV_MODE=1
    *("/server_info", "/collective_rpc", "/reset_prefix_cache", "/pause", "/resume", "/is_paused"),
    *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
    *("/update_weight_version", "/weight_info", "/weight_checker", "/get_world_size"),
)


@dataclass(frozen=True)
class ServerInfo:
    """world_size: workers of a server, over all its parallelisms; repacks: True if they have the extension above."""

    world_size: int
    repacks: bool


def wait_until_up(client: Client, url: str, seconds: float) -> None:
    """Wait for a server to start.

    Raises:
        EngineError: it is not up after `seconds`.
    """
    deadline, logged = time.monotonic() + seconds, False
    while True:
        try:
            return client.get(f"{url}/health")
        except EngineError as error:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"no vLLM server at {url} after {seconds:g} seconds: start one there, correct urls, or raise "
                    f"start_seconds. {error}"
                ) from error
        if not logged:
            log.warning("waiting up to %g seconds for the vLLM server at %s", seconds, url)
            logged = True
        time.sleep(min(1.0, seconds / 10))


def check_server(client: Client, url: str, spec: EngineSpec, tied: bool, by_folder: bool) -> ServerInfo:
    """Check a running server.

    Args:
        tied: the model's head is its embedding.
        by_folder: weights are sent in a folder, not by NCCL.

    Raises:
        ValueError: a requirement is not met; names all of them, and how to start the server.
    """
    paths = client.get(f"{url}/openapi.json")["paths"].keys()
    version = client.get(f"{url}/version")["version"]
    missing = {}
    if GENERATE not in paths:
        missing[f"{GENERATE} (tokens in, tokens out)"] = "--enable-scale-out"
    if lacking := [path for path in _DEVELOPMENT if path not in paths]:
        missing[", ".join(lacking)] = "the environment variable VLLM_SERVER_DEV_MODE=1"
        config: Any = {}
    else:
        config = client.get(f"{url}/server_info?config_format=json")["vllm_config"]
        missing |= _faults(config, spec, tied, by_folder)
    if missing:
        what, remedies = "; ".join(missing), " ".join(dict.fromkeys(missing.values()))
        raise ValueError(
            f"the vLLM server at {url} (version {version}) lacks: {what}. Start it with: {remedies}. It must be vLLM "
            "0.32 or later"
        )
    world_size = client.get(f"{url}/get_world_size")["world_size"]
    return ServerInfo(world_size, config["parallel_config"].get("worker_extension_cls") == EXTENSION)


def _faults(config: Any, spec: EngineSpec, tied: bool, by_folder: bool) -> dict[str, str]:
    """Return the unmet requirements of a server's configuration -> the option that meets each."""
    model, faults = config["model_config"], {}
    if model["logprobs_mode"] != "raw_logprobs":
        faults[f"untempered log-probabilities (it has {model['logprobs_mode']})"] = "--logprobs-mode raw_logprobs"
    if model["max_model_len"] < spec.max_model_len:
        faults[f"sequences of {spec.max_model_len} tokens (it takes {model['max_model_len']})"] = (
            f"--max-model-len {spec.max_model_len}"
        )
    if model["dtype"] != f"torch.{spec.dtype}":
        faults[f"engine_dtype {spec.dtype} (it has {model['dtype']})"] = f"--dtype {spec.dtype}"
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    if not by_folder and backend != "nccl":
        faults["weights by NCCL, as folder is null"] = """--weight-transfer-config '{"backend": "nccl"}'"""
    return faults | (_faults_on_cpu(config, tied) if config["device_config"]["device"] == "cpu" else {})


def _faults_on_cpu(config: Any, tied: bool) -> dict[str, str]:
    """Return what vLLM's CPU build needs additionally."""
    faults = {}
    if config["scheduler_config"]["enable_chunked_prefill"]:  # "CPU Generator does not use offset", and vLLM ends
        faults["a seed per response: on the CPU vLLM crashes on a seeded prompt with chunked prefill"] = (
            "--no-enable-chunked-prefill"
        )
    if tied and config["parallel_config"].get("worker_extension_cls") != EXTENSION:
        faults["updates of a head tied to the embedding: on the CPU vLLM keeps the first one"] = (
            f"--worker-extension-cls {EXTENSION}"
        )
    return faults
