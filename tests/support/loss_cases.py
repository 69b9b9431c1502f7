"""Small cases for the loss heads, a plain reference that holds all logits, and a count of what operators return."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdzero.losses import LOG_ZERO, Divergence, Kind, Outside, Support, divergence_head
from sdzero.losses.soft_targets import HiddenTargets, SoftTargets, TopKTargets

KINDS: tuple[Kind, ...] = get_args(Kind)
SUPPORTS: tuple[Support, ...] = get_args(Support)
OUTSIDES: tuple[Outside, ...] = get_args(Outside)
FORMS: list[dict[str, Any]] = [{}, *({"top_k": 4, "support": s, "outside": o} for s in SUPPORTS for o in OUTSIDES)]
DIVERGENCES = [Divergence(kind, weight=0.3, **form) for kind in KINDS for form in FORMS]


def name_of(divergence: Divergence) -> str:
    return "-".join(str(part) for part in (divergence.kind, divergence.top_k, divergence.support, divergence.outside))


def reference_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reference(logits_s: Tensor, logits_t: Tensor, divergence: Divergence) -> Tensor:
    """D [N] from whole logits [N, V], by the definitions alone."""
    log_s, log_t = logits_s.log_softmax(-1), logits_t.log_softmax(-1)
    if divergence.top_k is not None:
        ids = (log_t if divergence.support == "teacher" else log_s.detach()).topk(divergence.top_k).indices
        outside = torch.ones_like(log_s, dtype=torch.bool).scatter(1, ids, False)
        inside_s, inside_t = log_s.gather(1, ids), log_t.gather(1, ids)
        if divergence.outside == "renormalize":
            log_s, log_t = inside_s.log_softmax(-1), inside_t.log_softmax(-1)
        elif divergence.outside == "tail":
            rest_s, rest_t = (x.masked_fill(~outside, -torch.inf).logsumexp(-1, keepdim=True) for x in (log_s, log_t))
            log_s, log_t = torch.cat([inside_s, rest_s], -1), torch.cat([inside_t, rest_t], -1)
        else:
            log_t = torch.full_like(log_t, LOG_ZERO).scatter(1, ids, inside_t.log_softmax(-1))
    share = divergence.weight
    if divergence.kind == "jsd":
        mixture = (share * log_t.exp() + (1 - share) * log_s.exp()).clamp_min(1e-300).log()
        return share * reference_kl(log_t, mixture) + (1 - share) * reference_kl(log_s, mixture)
    forward = {"forward": 1.0, "reverse": 0.0, "mixed": share}[divergence.kind]
    return forward * reference_kl(log_t, log_s) + (1 - forward) * reference_kl(log_s, log_t)


class Case:
    """Random student and teacher of one size, in float64 unless told otherwise."""

    def __init__(
        self,
        n: int = 7,
        vocab: int = 11,
        hidden: int = 5,
        scale: float = 1.0,
        seed: int = 0,
        dtype: Any = torch.float64,
        device: str = "cpu",
    ) -> None:
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64).to(device, dtype)

        self.hidden = (normal(n, hidden) * scale).requires_grad_()
        self.weight = normal(vocab, hidden).requires_grad_()
        self.teacher = HiddenTargets(normal(n, hidden + 1) * scale, normal(vocab, hidden + 1))
        self.targets = torch.randint(vocab, (n,), generator=rng).to(device)
        token_weights = torch.rand(n, generator=rng).to(dtype) * (torch.rand(n, generator=rng) > 0.3)
        self.token_weights = token_weights.to(device)

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        return self.hidden @ self.weight.T, self.teacher.hidden @ self.teacher.weight.T

    def stored(self, top_k: int) -> TopKTargets:
        logprobs, ids = self.logits[1].log_softmax(-1).topk(top_k)
        order = torch.randperm(top_k)  # any order may be stored
        return TopKTargets(ids[:, order], logprobs[:, order])

    def grads(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.hidden, self.weight]))

    def head(self, divergence: Divergence, teacher: SoftTargets | None = None, **kwargs: Any) -> Any:
        teacher = teacher or self.teacher
        return divergence_head(self.hidden, self.weight, teacher, self.token_weights, 5.0, divergence, **kwargs)


class Recorder(TorchDispatchMode):
    """Largest tensor any operator returned, and how often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        strided = [x for x in results if isinstance(x, Tensor) and x.layout == torch.strided]
        self.largest = max(self.largest, *(x.numel() for x in strided), 0)
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return out

    @property
    def products(self) -> int:
        return sum(self.calls.get(name, 0) for name in ("mm", "addmm", "addmm_", "bmm"))
