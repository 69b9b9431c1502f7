"""Loss heads from hidden states to gradients, against bare matrix products and other implementations.

    python benchmarks/heads.py [--rounds 3] [--small]

`floor` is a lower bound for exact heads: student logits, teacher logits and the two products of the gradient, in
chunks with reused buffers (cross-entropy: without the teacher's). Prints a table and writes results/heads.json.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from sdzero.losses import Divergence, cross_entropy_head, divergence_head
from sdzero.losses.soft_targets import hidden_targets

VOCAB, CHUNK = 151_936, 256
Side = Callable[[], Any]


@dataclass
class Case:
    """Hidden states and heads of a student and a nearby teacher, float32 on a CPU and bfloat16 on a GPU."""

    num_tokens: int
    hidden_size: int
    vocab: int

    def __post_init__(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(0)
        n, h, v = self.num_tokens, self.hidden_size, self.vocab
        self.hidden = torch.randn(n, h, device=device, dtype=dtype).requires_grad_()
        self.weight = (torch.randn(v, h, device=device) / h**0.5).to(dtype).requires_grad_()
        self.teacher_hidden = self.hidden.detach() + 0.1 * torch.randn_like(self.hidden)
        self.teacher_weight = self.weight.detach().clone()
        self.targets = torch.randint(v, (n,), device=device)
        self.ones = torch.ones(n, device=device)

    @property
    def name(self) -> str:
        return f"H={self.hidden_size} V={self.vocab:,} N={self.num_tokens:,}"

    def trained(self, loss: Callable[[], Tensor]) -> Side:
        """Run `loss` and its gradients."""

        def run() -> None:
            self.hidden.grad = self.weight.grad = None
            loss().backward()

        return run


def floor(case: Case, with_teacher: bool) -> Side:
    chunk = 2048 if case.hidden.is_cuda else CHUNK
    logits, teacher_logits = (case.hidden.new_empty(chunk, case.vocab) for _ in range(2))

    @torch.no_grad()
    def run() -> None:
        grad_hidden, grad_weight = torch.empty_like(case.hidden), torch.zeros_like(case.weight)
        for start in range(0, case.num_tokens, chunk):
            hidden = case.hidden[start : start + chunk]
            out = torch.mm(hidden, case.weight.t(), out=logits[: len(hidden)])
            if with_teacher:
                teacher_hidden = case.teacher_hidden[start : start + chunk]
                torch.mm(teacher_hidden, case.teacher_weight.t(), out=teacher_logits[: len(hidden)])
            torch.mm(out, case.weight, out=grad_hidden[start : start + chunk])
            grad_weight.addmm_(out.t(), hidden)

    return run


def ours_kl(case: Case, divergence: Divergence, with_targets: bool = True) -> Side:
    targets = case.targets if with_targets else None

    def loss() -> Tensor:
        teacher = hidden_targets(case.teacher_hidden, case.teacher_weight)
        return divergence_head(
            case.hidden, case.weight, teacher, case.ones, case.num_tokens, divergence, targets=targets
        ).loss

    return case.trained(loss)


def naive_kl(case: Case) -> Side:
    def loss() -> Tensor:
        log_s = (case.hidden @ case.weight.t()).float().log_softmax(-1)
        with torch.no_grad():
            log_t = (case.teacher_hidden @ case.teacher_weight.t()).float().log_softmax(-1)
        return (log_s.exp() * (log_s - log_t)).sum(-1).mean()

    return case.trained(loss)


def trl_kl(case: Case) -> Side:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    def loss() -> Tensor:
        per_token, _ = ChunkedDivergenceFunction.apply(
            case.hidden, case.weight, None, case.teacher_hidden, case.teacher_weight, None, 1.0
        )
        return per_token.mean()

    return case.trained(loss)


def trl_top_k(case: Case) -> Side:
    """SDFTTrainer's loss, from whole logits of both models."""
    from trl.experimental.sdft.loss_utils import (  # pyright: ignore[reportMissingImports]
        compute_topk_self_distillation_loss,
    )

    def loss() -> Tensor:
        logits = case.hidden @ case.weight.t()
        with torch.no_grad():
            teacher_logits = case.teacher_hidden @ case.teacher_weight.t()
        return compute_topk_self_distillation_loss(
            logits, teacher_logits, distillation_topk=64, distillation_alpha=1.0, distillation_add_tail=True
        ).mean()

    return case.trained(loss)


def liger_kl(case: Case) -> Side:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    head = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=case.hidden.is_cuda, chunk_size=CHUNK
    )
    return case.trained(lambda: head(case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.targets))


def ours_ce(case: Case) -> Side:
    return case.trained(
        lambda: cross_entropy_head(case.hidden, case.weight, case.targets, case.ones, case.num_tokens).loss
    )


def naive_ce(case: Case) -> Side:
    return case.trained(lambda: F.cross_entropy((case.hidden @ case.weight.t()).float(), case.targets))


def trl_ce(case: Case) -> Side:
    from trl.kernels import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]

    def loss() -> Tensor:
        return -ChunkedLogProbFunction.apply(case.hidden, case.weight, None, case.targets, 1.0, 8192, None, 1.0, ())[
            0
        ].mean()

    return case.trained(loss)


def liger_ce(case: Case) -> Side:
    """Liger's head, which needs Triton on a GPU."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    head = LigerFusedLinearCrossEntropyLoss()
    return case.trained(lambda: head(case.weight, case.hidden, case.targets))


def sides(case: Case, kind: str) -> dict[str, Side]:
    """Sides that can run here; packages of peers may be missing."""
    makers: dict[str, Callable[[Case], Side]] = {
        "floor": functools.partial(floor, with_teacher=kind == "kl"),
        **(
            {
                "ours": functools.partial(ours_kl, divergence=Divergence()),
                "ours, top-64 renormalised": functools.partial(ours_kl, divergence=Divergence(top_k=64)),
                "ours, JSD": functools.partial(ours_kl, divergence=Divergence("jsd")),
                "naive": naive_kl,
                "TRL DistillationTrainer": trl_kl,
                "TRL SDFTTrainer, top-64 + tail": trl_top_k,
                "Liger": liger_kl,
            }
            if kind == "kl"
            else {"ours": ours_ce, "naive": naive_ce, "TRL chunked": trl_ce}
        ),
    }
    if kind == "ce" and case.hidden.is_cuda:
        makers["Liger"] = liger_ce
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make(case)
        except ModuleNotFoundError as error:
            print(f"{name}: left out, {error}")
    return made


def main() -> None:
    given = measure.parser(__doc__, rounds=3).parse_args()
    sizes = {1024: 8192, 2560: 8192, 4096: 8192} if torch.cuda.is_available() else {256: 2048, 1024: 512}
    if given.small:
        sizes = {16: 64}
    vocab = 512 if given.small else VOCAB
    measure.one_thread()
    rows = []
    for hidden_size, num_tokens in sizes.items():
        case = Case(num_tokens, hidden_size, vocab)
        for kind in ("kl", "ce"):
            name = f"{kind} {case.name}"
            rows += measure.compare(name, sides(case, kind), "floor", given.rounds, work=num_tokens)
    settings = {"rounds": given.rounds, "chunk": CHUNK}
    about = "Loss heads, hidden states to gradients; ratio to the bare matrix products"
    measure.write("heads", about, settings, rows, given)


if __name__ == "__main__":
    main()
