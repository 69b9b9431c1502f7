"""Inputs and outputs of vLLM: sampling parameters, requests, and the tokens of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from sdzero.engines.base import EngineDied, TokenChunk
from sdzero.prompts import PromptBuilder
from sdzero.trainer.collectives import all_gather_objects
from sdzero.types import Sampling, TokenIds


@dataclass(frozen=True)
class Request:
    """One vLLM request. token_ids: prompt and partial response; max_tokens: maximum number of new tokens."""

    token_ids: TokenIds
    max_tokens: int


def sampling_params(sampling: Sampling, builder: PromptBuilder, by_step: bool) -> Callable[[int], Any]:
    """Return a function from a maximum number of new tokens to vLLM's `SamplingParams`.

    `by_step` requests the new tokens of every step; otherwise vLLM returns whole responses as flat lists, which saves
    about 10 microseconds of Python per token.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    def params(max_tokens: int) -> Any:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_tokens=max_tokens,
            stop_token_ids=sorted(builder.end_ids),
            ignore_eos=True,  # only the builder's end-of-turn tokens end a response
            logprobs=0,  # of the sampled token only
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if by_step else RequestOutputKind.FINAL_ONLY,
            flat_logprobs=not by_step,  # split into steps, flat lists cost more than they save
        )

    return params


def gather_requests(
    requests: Sequence[Request], seed: int, tensor_parallel_size: int
) -> tuple[Sequence[Request], int, int]:
    """Gather the requests of an engine's ranks; return them, the index of this rank's first, and a common seed.

    Collective over the engine's ranks.
    """
    if tensor_parallel_size == 1:
        return requests, 0, seed
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    gathered = all_gather_objects((list(requests), seed), group.cpu_group)
    first = sum(len(rows) for rows, _ in gathered[: group.rank_in_group])
    return [row for rows, _ in gathered for row in rows], first, gathered[0][1]


def run_requests(
    engine: Any,
    requests: Sequence[Request],
    params: Callable[[int], Any],
    deadline_seconds: float,
    order: Sequence[int],
) -> Iterator[dict[int, TokenChunk]]:
    """Step the engine, yielding request index -> new tokens: of each step, or of a whole response, as `params` asks.

    Args:
        order: request indices in the order in which the engine receives them.

    Raises:
        EngineDied: vLLM died or passed the deadline, or aborted, lost or continued a request wrongly.
    """
    deadline, finished = monotonic() + deadline_seconds, set[int]()
    try:
        for index in order:
            request = requests[index]
            prompt = {"prompt_token_ids": list(request.token_ids)}
            engine.add_request(str(index), prompt, params(request.max_tokens))
        while engine.has_unfinished_requests():
            if monotonic() > deadline:
                raise EngineDied(
                    f"vLLM finished {len(finished)} of {len(requests)} responses in deadline_seconds "
                    f"{deadline_seconds}: raise it, or sample fewer prompts per call"
                )
            yield _new_tokens(engine.step(), finished)
    except EngineDied:
        raise
    except Exception as error:  # vLLM raises many kinds
        raise EngineDied(f"vLLM died with {len(finished)} of {len(requests)} responses finished") from error
    if finished != set(range(len(requests))):
        raise EngineDied(f"vLLM returned {len(finished)} of {len(requests)} responses and reported no error")


def _new_tokens(outputs: Sequence[Any], finished: set[int]) -> dict[int, TokenChunk]:
    """Extract the new tokens from a step's `RequestOutput`s; add the requests that ended to `finished`."""
    chunks = {}
    for output in outputs:
        index, part = int(output.request_id), output.outputs[0]
        if index in finished:
            raise EngineDied(f"vLLM continued request {index} after its end")
        if output.finished:
            if len(output.outputs) != 1 or part.finish_reason not in ("stop", "length"):
                raise EngineDied(f"vLLM aborted request {index}: {[o.finish_reason for o in output.outputs]}")
            finished.add(index)
        chunks[index] = TokenChunk(tuple(part.token_ids), _logprobs(part))
    return chunks


def _logprobs(part: Any) -> tuple[float, ...]:
    """Return the log-probabilities of a `CompletionOutput`'s tokens. Flat lists hold only those of sampled tokens."""
    if isinstance(part.logprobs, list):
        return tuple(at[token].logprob for token, at in zip(part.token_ids, part.logprobs, strict=True))
    return tuple(part.logprobs.logprobs)
