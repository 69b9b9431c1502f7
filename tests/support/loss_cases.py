"""Small cases for the loss heads, their exact results by the reference, and a recorder of operators."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdzero.losses import Divergence, Kind, Outside, Support, cross_entropy_head, divergence_head
from sdzero.losses.reference import surprisal, token_divergence
from sdzero.losses.soft_targets import HiddenTargets, SoftTargets, TopKTargets

KINDS: tuple[Kind, ...] = get_args(Kind)
SUPPORTS: tuple[Support, ...] = get_args(Support)
OUTSIDES: tuple[Outside, ...] = get_args(Outside)
FORMS: list[dict[str, Any]] = [{}, *({"top_k": 4, "support": s, "outside": o} for s in SUPPORTS for o in OUTSIDES)]
DIVERGENCES = [Divergence(kind, weight=0.3, **form) for kind in KINDS for form in FORMS]
HEADS: list[Divergence | None] = [None, *DIVERGENCES]  # None is cross-entropy


def name_of(divergence: Divergence | None) -> str:
    if divergence is None:
        return "cross_entropy"
    return "-".join(str(part) for part in (divergence.kind, divergence.top_k, divergence.support, divergence.outside))


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

    def head(
        self,
        divergence: Divergence | None,
        teacher: SoftTargets | None = None,
        num_tokens: float = 5.0,
        inputs: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Apply the fused head to the case, or to other `inputs` (hidden, weight)."""
        hidden, weight = inputs or (self.hidden, self.weight)
        if divergence is None:
            kwargs.pop("targets", None)  # cross-entropy always takes the case's own
            return cross_entropy_head(hidden, weight, self.targets, self.token_weights, num_tokens, **kwargs)
        teacher = teacher or self.teacher
        return divergence_head(hidden, weight, teacher, self.token_weights, num_tokens, divergence, **kwargs)

    def exact(self, divergence: Divergence | None, num_tokens: float = 5.0) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute token losses, loss and gradients by the reference, in float64 on the CPU."""
        hidden, weight = (x.detach().double().cpu().requires_grad_() for x in (self.hidden, self.weight))
        logits, teacher = hidden @ weight.T, (x.double().cpu() for x in vars(self.teacher).values())
        if divergence is None:
            values = surprisal(logits, self.targets.cpu())
        else:
            hidden_t, weight_t = teacher
            values = token_divergence(logits, hidden_t @ weight_t.T, divergence)
        loss = (self.token_weights.double().cpu() * values).sum() / num_tokens
        return values.detach(), loss.detach(), list(torch.autograd.grad(loss, [hidden, weight]))


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
