"""The reference itself: against torch.distributions, closed-form gradients and sums written out, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from sdzero.losses import Divergence, cross_entropy_head
from sdzero.losses import reference as ref
from support.loss_cases import OUTSIDES, SUPPORTS, Case


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    student, teacher = (x.detach() for x in Case().logits)
    return student.requires_grad_(), teacher


def test_divergences_are_those_of_torch_distributions(logits: tuple[Tensor, Tensor]) -> None:
    s, t = (Categorical(logits=x.detach()) for x in logits)
    m = Categorical(probs=0.3 * t.probs + 0.7 * s.probs)
    expected = {
        "reverse": kl_divergence(s, t),
        "forward": kl_divergence(t, s),
        "mixed": 0.3 * kl_divergence(t, s) + 0.7 * kl_divergence(s, t),
        "jsd": 0.3 * kl_divergence(t, m) + 0.7 * kl_divergence(s, m),
    }
    for kind, values in expected.items():
        torch.testing.assert_close(ref.token_divergence(*logits, Divergence(kind, 0.3)).detach(), values)  # pyright: ignore[reportArgumentType]


def test_gradients_have_their_closed_forms(logits: tuple[Tensor, Tensor]) -> None:
    s, t = (x.detach().log_softmax(-1) for x in logits)
    reverse = s.exp() * (s - t - ref.kl(s, t)[:, None])
    for kind, expected in (("reverse", reverse), ("forward", s.exp() - t.exp())):
        (grad,) = torch.autograd.grad(ref.token_divergence(*logits, Divergence(kind)).sum(), logits[0])  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("outside", OUTSIDES)
def test_top_k_reverse_kl_is_the_sum_written_out(logits: tuple[Tensor, Tensor], support: str, outside: str) -> None:
    divergence = Divergence(top_k=4, support=support, outside=outside)  # pyright: ignore[reportArgumentType]
    values = ref.token_divergence(*logits, divergence)
    for row, value in enumerate(values.tolist()):
        s, t = (x[row].softmax(-1).tolist() for x in logits)
        ids = sorted(range(len(s)), key=lambda i: -(t if support == "teacher" else s)[i])[:4]
        mass_s, mass_t = (sum(p[i] for i in ids) for p in (s, t))
        if outside == "renormalize":
            pairs = [(s[i] / mass_s, t[i] / mass_t) for i in ids]
        else:
            pairs = [*((s[i], t[i]) for i in ids), (1 - mass_s, 1 - mass_t)]
        assert value == pytest.approx(sum(p * (math.log(p) - math.log(q)) for p, q in pairs))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_srt_token_weights_give_equation_3(reduction: str) -> None:
    """The head's one sum with the weights of `SRT` is L_revision + L_generation of two traces."""
    case = Case()
    lengths, num_init = [3, 4], [1, 2]
    logits, targets = case.logits[0].split(lengths), case.targets.split(lengths)
    num_gen, num_rev = (7, 4) if reduction == "token_mean" else (2, 2)
    is_revised = torch.tensor([0, 1, 1, 0, 0, 1, 1])
    weights = 1 / num_gen + is_revised.double() / num_rev
    expected = ref.srt_loss(logits, targets, num_init, reduction)
    out = cross_entropy_head(case.hidden, case.weight, case.targets, weights, 1.0)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(case.grads(out.loss), case.grads(expected))


def test_equation_4_is_the_mean_over_tokens_or_responses() -> None:
    case = Case()
    student, teacher = (x.split([3, 4]) for x in case.logits)
    values = ref.token_divergence(*case.logits, Divergence())
    torch.testing.assert_close(ref.self_distillation_loss(student, teacher, Divergence()), values.mean())
    summed = ref.self_distillation_loss(student, teacher, Divergence(), "sequence_sum")
    torch.testing.assert_close(summed, (values[:3].sum() + values[3:].sum()) / 2)
