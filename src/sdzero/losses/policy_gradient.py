"""Clipped policy gradient (PPO, GRPO, DAPO) from hidden states.

Legend: N target tokens, V vocabulary, H hidden, C tokens of a chunk. All values are in nats. Log-probabilities are
those at the sampling temperature: the gradient is that of the distribution that was sampled from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdzero.losses import matmul, row_ops
from sdzero.losses.fused_linear import Projection, chunked_head
from sdzero.types import LossOutput

MAX_LOG_RATIO = 20.0
"""Bound of |log ratio|, of the policy to the sampler's and of the reference to the policy (verl). Beyond it no gradient
flows."""
MAX_KL = 10.0
"""Bound of the KL estimate of a token (verl)."""


@dataclass(frozen=True)
class PolicyLoss:
    """Loss of one sampled token y_t: -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) + kl_coef * k3
    - entropy_coef * H, where r = pi(y_t) / pi_old(y_t), A is the advantage, H the policy's entropy, and
    k3 = e^d - d - 1 with d = log pi_ref(y_t) - log pi(y_t).

    Args:
        clip_low: distance below 1 at which the ratio of a token with A < 0 is clipped.
        clip_high: distance above 1 at which the ratio of a token with A > 0 is clipped (DAPO's clip-higher).
        dual_clip: ratio above which a token with A < 0 has the loss -dual_clip * A and no gradient; null: none.
        kl_coef: weight of k3, a penalty on the distance from the reference.
        entropy_coef: weight of the entropy, a bonus.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.clip_low > 1:
            raise ValueError(f"clip_low must be at most 1, got {self.clip_low}: ratios are positive")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}: it bounds ratios from above")


def policy_gradient_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    num_tokens: float | Tensor,
    policy_loss: PolicyLoss,
    temperature: float = 1.0,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    chunk_size: int | None = None,
) -> LossOutput:
    """Compute sum(token_weights * loss of the token) / num_tokens.

    Args:
        hidden: [N, H], last hidden states; N may be 0.
        weight: [V, H], LM head; dtypes as in `cross_entropy_head`.
        targets: [N] int64, the sampled tokens.
        advantages: [N].
        token_weights: [N].
        num_tokens: divisor of the sum, counted over all ranks and micro batches.
        policy_loss: terms of the loss.
        temperature: divisor of the logits, the sampling temperature.
        old_logprobs: [N], log pi_old(targets) at that temperature; None: the policy's own values, so the ratio is 1.
        reference_logprobs: [N], log pi_ref(targets) at that temperature; needed for kl_coef.
        chunk_size: as in `cross_entropy_head`.

    Returns:
        The loss, differentiable once in `hidden` and `weight`. Metrics, each [N] and detached: `logprobs` of the
        targets, `entropy`, `ratio`, `clipped` (1 where a clip stops the gradient) and, with a reference, `kl`.

    Raises:
        ValueError: kl_coef has no reference, temperature is 0, or chunk_size or num_tokens is not positive.
    """
    if policy_loss.kl_coef and reference_logprobs is None:
        raise ValueError("kl_coef needs the log-probabilities of a reference")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: the likeliest token has no policy gradient")
    dtype = matmul.result_dtype(hidden, weight)
    names = ["logprobs", "entropy", "ratio", "clipped", *["kl"] * (reference_logprobs is not None)]
    metrics = {name: torch.zeros_like(token_weights, dtype=dtype) for name in names}

    def body(student: Projection, rows: slice, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        def token_loss(logprobs: Tensor, entropy: Tensor, block: slice) -> tuple[Tensor, Tensor]:
            def part(tensor: Tensor | None) -> Tensor | None:
                return None if tensor is None else tensor[rows][block].detach().to(dtype)

            terms = _token_loss(
                policy_loss, logprobs, entropy, part(advantages), part(old_logprobs), part(reference_logprobs)
            )
            for name, values in {**terms.metrics, "logprobs": logprobs, "entropy": entropy}.items():
                metrics[name][rows][block] = values.to(dtype)
            return terms.values, terms.slope

        logits, coefficient = student.logits(rows), policy_loss.entropy_coef
        return row_ops.policy_gradient(
            logits, targets[rows], token_loss, temperature, coefficient, scale, student.operands
        )

    loss, _ = chunked_head(hidden, weight, token_weights, num_tokens, body, chunk_size)
    return LossOutput(loss, metrics)


@dataclass(frozen=True)
class _Terms:
    values: Tensor  # [C], the loss of each token
    slope: Tensor  # [C], its derivative with respect to log pi(y_t); the entropy's gradient is not in it
    metrics: dict[str, Tensor]


def _token_loss(
    loss: PolicyLoss,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor | None,
    old_logprobs: Tensor | None,
    reference_logprobs: Tensor | None,
) -> _Terms:
    assert advantages is not None
    log_ratio = torch.zeros_like(logprobs) if old_logprobs is None else logprobs - old_logprobs
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gain = ratio * advantages
    values = -torch.minimum(gain, ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high) * advantages)
    is_negative = advantages < 0
    clipped = torch.where(is_negative, ratio < 1 - loss.clip_low, (advantages > 0) & (ratio > 1 + loss.clip_high))
    if loss.dual_clip is not None:
        clipped |= is_negative & (ratio > loss.dual_clip)
        values = torch.where(is_negative, torch.minimum(values, -loss.dual_clip * advantages), values)
    slope = torch.where(clipped | (log_ratio.abs() > MAX_LOG_RATIO), 0.0, -gain)
    values = values - loss.entropy_coef * entropy
    metrics = {"ratio": ratio, "clipped": clipped}
    if reference_logprobs is not None:
        delta = reference_logprobs - logprobs
        bounded = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        k3 = bounded.exp() - bounded - 1
        flows = (delta.abs() <= MAX_LOG_RATIO) & (k3 <= MAX_KL)
        metrics["kl"] = k3.clamp(max=MAX_KL)
        values = values + loss.kl_coef * metrics["kl"]
        slope = slope + loss.kl_coef * torch.where(flows, 1 - bounded.exp(), 0.0)
    return _Terms(values, slope, metrics)
