"""The policy-gradient head against autograd on whole logits in float64, and the properties of its terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdzero.losses import PolicyLoss, cross_entropy_head, matmul, policy_gradient_head
from sdzero.losses.reference import policy_loss

N, V, H = 9, 11, 5
LOSSES = {
    "plain": PolicyLoss(),
    "clip higher": PolicyLoss(clip_low=0.2, clip_high=0.28, dual_clip=10.0),
    "dual clip": PolicyLoss(clip_low=0.1, clip_high=0.1, dual_clip=1.5),
    "kl": PolicyLoss(kl_coef=0.3),
    "entropy": PolicyLoss(entropy_coef=0.2),
    "all": PolicyLoss(0.3, 0.2, 2.0, 0.1, 0.05),
}


class Tokens:
    """Random hidden states, head, sampled tokens and advantages of both signs, in float64."""

    def __init__(self, seed: int = 0, temperature: float = 1.0, spread: float = 1.0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(N, H, generator=rng, dtype=torch.float64).requires_grad_()
        self.weight = torch.randn(V, H, generator=rng, dtype=torch.float64).requires_grad_()
        self.targets = torch.randint(V, (N,), generator=rng)
        self.advantages = torch.randn(N, generator=rng, dtype=torch.float64)
        self.token_weights = torch.rand(N, generator=rng, dtype=torch.float64)
        self.temperature = temperature
        noise = torch.randn(2, N, generator=rng, dtype=torch.float64) * spread
        self.old, self.reference = self.log_probs().detach().gather(1, self.targets[:, None]).T + noise

    def log_probs(self) -> Tensor:
        return (self.hidden @ self.weight.T / self.temperature).log_softmax(-1)

    def head(self, loss: PolicyLoss, **options: Any) -> Any:
        options = {"old_logprobs": self.old, "reference_logprobs": self.reference, **options}
        return policy_gradient_head(
            self.hidden,
            self.weight,
            self.targets,
            self.advantages,
            self.token_weights,
            4.0,
            loss,
            self.temperature,
            **options,
        )

    def exact(self, loss: PolicyLoss, old: Tensor | None = None) -> Tensor:
        log_probs = self.log_probs()
        logprobs = log_probs.gather(1, self.targets[:, None]).squeeze(1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        old = self.old if old is None else old
        values = policy_loss(logprobs, old, self.advantages, self.reference, entropy, loss)
        return (self.token_weights * values).sum() / 4.0

    def grads(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.hidden, self.weight]))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "BLOCK_ELEMENTS", 24)  # two rows of eleven


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_autograd(name: str, temperature: float) -> None:
    tokens = Tokens(temperature=temperature)
    out = tokens.head(LOSSES[name], chunk_size=4)
    expected = tokens.exact(LOSSES[name])
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(tokens.grads(out.loss), tokens.grads(expected))
    ratio = (out.metrics["logprobs"] - tokens.old).exp()
    torch.testing.assert_close(out.metrics["ratio"], ratio)
    assert 0 < out.metrics["clipped"].sum() < N


@given(st.integers(0, 999), st.sampled_from(sorted(LOSSES)), st.sampled_from([0.3, 1.0, 2.0]), st.integers(1, N))
def test_any_tokens_and_chunks(seed: int, name: str, temperature: float, chunk_size: int) -> None:
    tokens = Tokens(seed, temperature, spread=0.5)
    out, expected = tokens.head(LOSSES[name], chunk_size=chunk_size), tokens.exact(LOSSES[name])
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(tokens.grads(out.loss), tokens.grads(expected))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("edge", [0.8, 1.2, 3.0])
@pytest.mark.parametrize("offset", [-1e-6, 0.0, 1e-6])
def test_a_token_beyond_its_clip_has_no_gradient(advantage: float, edge: float, offset: float) -> None:
    tokens, loss = Tokens(), PolicyLoss(0.2, 0.2, dual_clip=3.0)
    ratio = edge + offset
    tokens.advantages = torch.full((N,), advantage, dtype=torch.float64)
    own = tokens.log_probs().gather(1, tokens.targets[:, None]).squeeze(1).detach()
    out = tokens.head(loss, old_logprobs=own - torch.tensor(ratio, dtype=torch.float64).log())
    if offset:  # exp and log do not hit an edge exactly
        is_clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8 or ratio > 3.0
        assert (out.metrics["clipped"] == is_clipped).all()
        assert all((grad.abs().max() < 1e-12) == is_clipped for grad in tokens.grads(out.loss))
    clamped = min(max(ratio, 0.8), 1.2)
    expected = -min(ratio * advantage, clamped * advantage)
    expected = min(expected, 3.0) if advantage < 0 else expected
    assert out.loss.item() == pytest.approx(expected * tokens.token_weights.sum().item() / 4.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_update_is_a_signed_cross_entropy_that_no_clip_changes(temperature: float) -> None:
    """REINFORCE with the group's baseline: cross-entropy with weights A / N, bitwise equal for every clip range."""
    tokens = Tokens(temperature=temperature)
    narrow, wide = (tokens.head(PolicyLoss(clip, clip), old_logprobs=None) for clip in (0.0, 1.0))
    grads = [tokens.grads(out.loss) for out in (narrow, wide)]
    assert torch.equal(narrow.loss, wide.loss) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert not narrow.metrics["clipped"].any() and (narrow.metrics["ratio"] == 1).all()
    weights = tokens.token_weights * tokens.advantages
    entropy = cross_entropy_head(tokens.hidden / temperature, tokens.weight, tokens.targets, weights, 4.0)
    torch.testing.assert_close(grads[0], tokens.grads(entropy.loss))


def test_a_policy_equal_to_its_reference_feels_no_penalty() -> None:
    tokens = Tokens()
    own = tokens.log_probs().gather(1, tokens.targets[:, None]).squeeze(1).detach()
    tokens.advantages = torch.zeros(N, dtype=torch.float64)
    out = tokens.head(PolicyLoss(kl_coef=1.0), old_logprobs=None, reference_logprobs=own)
    torch.testing.assert_close(out.metrics["kl"], torch.zeros(N, dtype=torch.float64))
    for grad in tokens.grads(out.loss):
        torch.testing.assert_close(grad, torch.zeros_like(grad))


def test_the_score_function_is_that_of_the_sampling_temperature() -> None:
    """Expected gradient over all tokens of a bandit = gradient of E[r] under the tempered policy; not without it."""
    temperature, rewards = 0.7, torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    hidden = torch.tensor([[1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.3], [1.1], [-0.4], [0.2], [0.9]], dtype=torch.float64).requires_grad_()
    probs = (hidden @ weight.T / temperature).softmax(-1)[0]
    (expected,) = torch.autograd.grad((probs * rewards).sum(), weight, retain_graph=True)

    def estimate(temperature: float) -> Tensor:
        """Return minus the gradient of the loss of every token, weighted by its probability of being sampled."""
        rows = hidden.expand(5, 1).clone().requires_grad_()
        out = policy_gradient_head(
            rows, weight, torch.arange(5), rewards, probs.detach(), 1.0, PolicyLoss(), temperature
        )
        return -torch.autograd.grad(out.loss, weight)[0]

    torch.testing.assert_close(estimate(temperature), expected)
    assert not torch.allclose(estimate(1.0), expected, rtol=0.05)


def test_extreme_ratios_stay_finite() -> None:
    tokens = Tokens()
    for shift in (-500.0, 500.0):
        out = tokens.head(LOSSES["all"], old_logprobs=tokens.old + shift, reference_logprobs=tokens.reference - shift)
        assert torch.isfinite(out.loss) and all(torch.isfinite(grad).all() for grad in tokens.grads(out.loss))


def test_no_tokens_give_a_zero_that_is_still_attached() -> None:
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    empty = torch.zeros(0)
    out = policy_gradient_head(hidden, weight, empty.long(), empty, empty, 3.0, PolicyLoss())
    out.loss.backward()
    assert out.loss.item() == 0 and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": -0.1}, "clip_low must be at least 0"),
        ({"clip_low": 1.5}, "clip_low must be at most 1"),
        ({"entropy_coef": float("nan")}, "entropy_coef must be at least 0"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
    ],
)
def test_wrong_terms_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**options)


def test_a_penalty_needs_a_reference_and_a_gradient_a_temperature() -> None:
    with pytest.raises(ValueError, match="kl_coef needs"):
        Tokens().head(PolicyLoss(kl_coef=0.1), reference_logprobs=None)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Tokens(temperature=0.0).head(PolicyLoss(), old_logprobs=None)
