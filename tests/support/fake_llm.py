"""vLLM played by a tiny model and a list of requests."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def finished(request_id: str, token_ids: list[int], reason: str | None = "length") -> Any:
    """Output of a step for a request; with a reason, its last."""
    flat = SimpleNamespace(logprobs=[-0.5] * len(token_ids))
    output = SimpleNamespace(token_ids=token_ids, logprobs=flat, finish_reason=reason)
    return SimpleNamespace(request_id=request_id, finished=reason is not None, outputs=[output])


class FakeLLM:
    """Answers each request with tokens 9 9, one request a step; `calls` are the names of the calls."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.calls: list[str] = []
        self.model = AutoModelForCausalLM.from_pretrained(options["model"])
        self.llm_engine = self
        self.requests: list[tuple[list[int], int]] = []  # each request's tokens, and how many may follow
        self.waiting: list[str] = []
        self.on_step: Callable[[], list[Any]] | None = None
        self.can_reset = True

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.params = params
        self.requests.append((prompt["prompt_token_ids"], params.max_tokens))
        self.waiting.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        if self.on_step:
            return self.on_step()
        return [finished(self.waiting.pop(), [9, 9])]

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        with torch.no_grad():
            for name, tensor in kwargs["weights_iterator"]:
                self.model.get_parameter(name).copy_(tensor)

    def apply_model(self, function: Callable[[torch.nn.Module], Any]) -> list[Any]:
        return [function(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return self.can_reset

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake_up {tags}")
