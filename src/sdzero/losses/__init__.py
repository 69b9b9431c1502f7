"""Losses on hidden states that never hold the logits of a batch: cross-entropy, divergences, policy gradient."""

from sdzero.losses.cross_entropy import cross_entropy_head
from sdzero.losses.divergence import Divergence, Kind, Outside, Support, divergence_head
from sdzero.losses.policy_gradient import PolicyLoss, policy_gradient_head
from sdzero.losses.soft_targets import check_top_k

__all__ = [
    "Divergence",
    "Kind",
    "Outside",
    "PolicyLoss",
    "Support",
    "check_top_k",
    "cross_entropy_head",
    "divergence_head",
    "policy_gradient_head",
]
