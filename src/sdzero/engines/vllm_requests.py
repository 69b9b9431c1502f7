"""What goes into vLLM and comes out of it: sampling parameters, requests, and each response as it finishes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

from torch import distributed as dist

from sdzero.engines.base import EngineError
from sdzero.prompts import PromptBuilder
from sdzero.types import Sampling


def sampling_params(sampling: Sampling, builder: PromptBuilder) -> Any:
    """vLLM's `SamplingParams`."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=sorted(builder.end_ids),
        ignore_eos=True,  # the builder's end-of-turn tokens are the only ones
        logprobs=0,  # of the sampled token alone
        detokenize=False,
    )


def shared_requests(
    token_ids: Sequence[Sequence[int]], seed: int, tensor_parallel_size: int
) -> tuple[Sequence[Sequence[int]], int, int]:
    """The requests of all ranks of one engine, where this rank's begin, and the seed all of them use. Collective."""
    if tensor_parallel_size == 1:
        return token_ids, 0, seed
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    gathered: list[Any] = [None] * group.world_size
    dist.all_gather_object(gathered, (list(token_ids), seed), group=group.cpu_group)
    first = sum(len(ids) for ids, _ in gathered[: group.rank_in_group])
    return [row for ids, _ in gathered for row in ids], first, gathered[0][1]


def run_requests(
    engine: Any, requests: Sequence[Sequence[int]], params: Any, deadline_seconds: float
) -> Iterator[tuple[int, Any]]:
    """(index, vLLM's `CompletionOutput`) of each request when it finishes; steps the engine, to watch the clock.

    Raises:
        EngineError: vLLM died, gave up a request, lost one or returned one twice, or passed the deadline.
    """
    deadline, finished = monotonic() + deadline_seconds, set[int]()
    try:
        for index, token_ids in enumerate(requests):
            engine.add_request(str(index), {"prompt_token_ids": list(token_ids)}, params)
        while engine.has_unfinished_requests():
            if monotonic() > deadline:
                raise EngineError(
                    f"vLLM finished {len(finished)} of {len(requests)} responses in deadline_seconds "
                    f"{deadline_seconds}: raise it, or sample fewer prompts per call"
                )
            for output in engine.step():
                if output.finished:
                    index = int(output.request_id)
                    _check(output, index in finished)
                    finished.add(index)
                    yield index, output.outputs[0]
    except EngineError:
        raise
    except Exception as error:  # whatever vLLM raises
        raise EngineError(f"vLLM died with {len(finished)} of {len(requests)} responses finished") from error
    if finished != set(range(len(requests))):
        raise EngineError(f"vLLM returned {len(finished)} of {len(requests)} responses and called itself done")


def _check(output: Any, came_before: bool) -> None:
    if came_before:
        raise EngineError(f"vLLM returned request {output.request_id} twice")
    if len(output.outputs) != 1 or output.outputs[0].finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM gave up request {output.request_id}: {[o.finish_reason for o in output.outputs]}")


def logprobs(output: Any) -> list[float]:
    """Log-probability of each token of a `CompletionOutput`."""
    return [values[token].logprob for token, values in zip(output.token_ids, output.logprobs, strict=True)]
