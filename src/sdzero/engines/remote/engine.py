"""vLLM servers on other GPUs or machines, which sample while the trainer trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch import distributed as dist

from sdzero.engines.base import (
    EngineDied,
    EngineError,
    EngineSpec,
    OnTokens,
    RolloutEngine,
    SyncReport,
    TokenChunk,
    ignore,
    preserve_rng,
)
from sdzero.engines.remote.client import Client
from sdzero.engines.remote.server import GENERATE, check_server, wait_until_up
from sdzero.engines.remote.weight_transfer import EMPTY, Digests, FolderTransport, NCCLTransport
from sdzero.engines.sync_check import SyncCheck, WeightLayout
from sdzero.prompts import PromptBuilder
from sdzero.trainer.collectives import rank, world_size
from sdzero.types import Prompt, Rollout, Sampling
from sdzero.utils.process import watchdog
from sdzero.utils.seeds import derive_seed

_GRACE_SECONDS = 60.0  # after the deadline, until the watchdog ends a process that hangs in NCCL
_FAULTS = (RuntimeError, OSError, ValueError, SafetensorError)  # of a transfer: EngineError, NCCL, full disk, ...


class RemoteVLLMEngine(RolloutEngine):
    """vLLM servers that are started separately from the trainer and receive weights by `sync`.

    Each rank samples from one server; rank 0 sends the weights to all of them. Each response has its own seed, so a
    repeated call repeats its tokens up to the server's arithmetic: the order of its sums depends on its other load.
    Every response names the checksum of its weights: responses from weights of another trainer, or of a restarted
    server, are rejected.

    Args:
        urls: addresses of the servers, e.g. `http://node7:8000`; ranks are assigned round-robin.
        folder: folder for the transfer of weights as files, which trainer and servers see under the same path (/dev/shm
            on one machine); null sends them by NCCL, from GPU to GPU, to one server.
        deadline_seconds: limit of one generate call and of one transfer; exceeding it raises EngineError.
        start_seconds: time that the start waits for servers that are not up yet.
    """

    is_remote = True
    starts_collectively = True

    def __init__(
        self,
        urls: list[str],
        folder: Path | None = None,
        deadline_seconds: float = 3600.0,
        start_seconds: float = 300.0,
    ) -> None:
        if not urls:
            raise ValueError("urls is empty: name the vLLM server, as http://node7:8000")
        if wrong := [url for url in urls if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"urls: {wrong[0]!r} does not start with http:// or https://")
        if folder is None and len(urls) > 1:
            raise ValueError("urls names several servers: set folder, since NCCL transfers to one server only")
        if deadline_seconds <= 0 or start_seconds <= 0:
            raise ValueError("deadline_seconds and start_seconds must be positive")
        self.urls = [url.rstrip("/") for url in urls]
        self.folder = folder
        self.deadline_seconds = deadline_seconds
        self.start_seconds = start_seconds
        self._http: Client | None = None
        self._transport: FolderTransport | NCCLTransport | None = None

    def start(self, spec: EngineSpec, builder: PromptBuilder) -> None:
        """Connect to the servers and check them.

        Raises:
            ValueError: a server lacks a requirement; names it, and how to start the server.
        """
        self._spec, self._builder, self._dtype = spec, builder, getattr(torch, spec.dtype)
        self._layout = WeightLayout.of_pretrained(spec.model_path)
        self._url = self.urls[rank() % len(self.urls)]
        self._http = Client()
        self._sent, self._held = "", dict[str, Any]()  # checksum of the last weights; digests by server
        self._label = ""
        tied = len(self._layout.required) < len(self._layout.shapes)
        try:
            for url in self.urls:
                wait_until_up(self._client, url, self.start_seconds)
            self._servers = {
                url: check_server(self._client, url, spec, tied, self.folder is not None) for url in self.urls
            }
        except BaseException:
            self.close()
            raise
        if spec.load_weights:
            self._sync_from_files()

    @property
    def _client(self) -> Client:
        assert self._http is not None, "the engine is not started, or closed"
        return self._http

    def _sync_from_files(self) -> None:
        """Send the weights of the model folder: a server may hold those of another stage."""
        from transformers import AutoModelForCausalLM

        with preserve_rng():
            path = self._spec.model_path
            model = AutoModelForCausalLM.from_pretrained(path, dtype=self._dtype) if rank() == 0 else None
        self.sync(model.named_parameters() if model is not None else (), 0)

    # --- weights --------------------------------------------------------------------------------

    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        started = perf_counter()
        self.policy_version = None  # after an interrupted sync the engine refuses to generate
        if world_size() > 1:
            dist.barrier()  # no rank may still sample from the old weights
        weights = iter(weights)
        outcome: list[Any] = ["", "", "", False]  # checksum, label, error, whether a server died
        if rank() == 0:
            try:
                outcome[:2] = self._transfer(weights, policy_version)
            except _FAULTS as error:
                outcome[2:] = f"{type(error).__name__}: {error}", isinstance(error, EngineDied)
        deque(weights, 0)  # gathering them is collective
        if world_size() > 1:
            dist.broadcast_object_list(outcome)
        checksum, self._label, fault, died = outcome
        if fault:
            kind = EngineDied if died else EngineError
            raise kind(f"weights of policy version {policy_version} did not reach the vLLM server. {fault}")
        self.policy_version = policy_version
        return SyncReport(perf_counter() - started, checksum)

    def _transfer(self, weights: Iterator[tuple[str, Tensor]], policy_version: int) -> tuple[str, str]:
        """Send and verify the weights; return their checksum and their label on the servers."""
        check, digests = SyncCheck(self._layout, {}, self._dtype), Digests(self._dtype)
        pairs = (pair for pair in digests.watch(check.watch(weights)) if pair[0] in self._layout.required)
        with self._paused():
            with self._guarded():
                self._connected().send(pairs)
            checksum = check.checksum()
            label = f"{policy_version}-{checksum}"
            if any(server.repacks for server in self._servers.values()):
                self._post_all("/collective_rpc", {"method": "repack_heads"})
            if not all(answer["success"] for answer in self._post_all("/reset_prefix_cache")):
                raise EngineError("a vLLM server could not reset its prefix cache, which belongs to older weights")
            self._compare(digests, checksum)
            self._post_all("/update_weight_version", {"new_version": label})
        for url in self.urls:
            if (version := self._client.get(f"{url}/weight_info")["weight_version"]) != label:
                raise EngineError(f"the vLLM server at {url} holds weights {version}, not {label}")
        return checksum, label

    def _compare(self, digests: Digests, checksum: str) -> None:
        """Compare the servers' weights with those sent.

        Raises:
            EngineError: a comparable tensor differs, or a server's weights did not change when the sent ones did.
        """
        held = [answer["checksums"] for answer in self._post_all("/weight_checker", {"action": "checksum"})]
        for url, own in zip(self.urls, held, strict=True):
            digests.compare(url, own, self._servers[url].world_size)
            # packed weights have no digest that could change
            if self._sent not in ("", checksum) and own == self._held[url] and EMPTY not in own.values():
                raise EngineError(f"weight sync: the vLLM server at {url} still holds the weights of the previous sync")
        self._sent, self._held = checksum, dict(zip(self.urls, held, strict=True))

    def _connected(self) -> FolderTransport | NCCLTransport:
        """Connect at the first sync, since NCCL needs both sides."""
        if self._transport is None:
            if self.folder is not None:
                self._transport = FolderTransport(
                    self._client, self.urls, self.folder, self._dtype, self.deadline_seconds
                )
            else:
                num_workers = self._servers[self._url].world_size
                self._transport = NCCLTransport(
                    self._url, self._layout, num_workers, self._dtype, self.deadline_seconds
                )
        return self._transport

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Pause all servers: running requests finish first, new ones wait."""
        self._post_all("/pause?mode=wait")
        try:
            yield
        finally:
            self._post_all("/resume")

    def _guarded(self) -> AbstractContextManager[None]:
        """Guard against NCCL, which waits forever for a dead server."""
        return watchdog(self.deadline_seconds + _GRACE_SECONDS) if self.folder is None else nullcontext()

    def _post_all(self, path: str, body: Any = None) -> list[Any]:
        return self._client.post_all([(f"{url}{path}", body) for url in self.urls], self.deadline_seconds)

    # --- sampling -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        policy_version: int,
        on_tokens: OnTokens = ignore,
        partials: Sequence[TokenChunk] = (),
    ) -> list[Rollout]:
        self._check_version(policy_version)
        self._check_lengths(prompts, sampling, self._spec.max_model_len)
        label, url = self._label, f"{self._url}{GENERATE}"
        bodies = [self._request(prompt, sampling, derive_seed(seed, place)) for place, prompt in enumerate(prompts)]
        answers = self._client.post_all([(url, body) for body in bodies], self.deadline_seconds)
        return [self._read(p, answer, label, sampling) for p, answer in zip(prompts, answers, strict=True)]

    def _request(self, prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Any]:
        """Set every option that affects sampling; the others would come from the model's own defaults."""
        params = {
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": 0,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "stop_token_ids": sorted(self._builder.end_ids),
            "ignore_eos": True,  # only the builder's end-of-turn tokens end a response
            "logprobs": 0,  # of the sampled token only
            "detokenize": False,
        }
        return {"token_ids": list(prompt.token_ids), "sampling_params": params}

    def _read(self, prompt: Prompt, answer: Any, label: str, sampling: Sampling) -> Rollout:
        name = prompt.question.id
        choices = answer["choices"]
        if len(choices) != 1 or choices[0]["finish_reason"] not in ("stop", "length"):
            raise EngineDied(f"vLLM aborted question {name!r}: {[c['finish_reason'] for c in choices]}")
        [choice] = choices
        if others := {span["version"] for span in choice["weight_versions"] or ()} - {label}:
            raise EngineDied(
                f"the response to question {name!r} was sampled from weights {sorted(others)}, not {label}: another "
                "trainer uses the vLLM server, or it was restarted"
            )
        logprobs = [at["logprob"] for at in choice["logprobs"]["content"]]
        return self._rollout(self._builder, prompt, choice["token_ids"], logprobs, sampling.max_new_tokens)

    def close(self) -> None:
        """Cancel running requests; the servers keep running."""
        self.policy_version = None
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        if self._http is not None:
            self._http.close()
            self._http = None
