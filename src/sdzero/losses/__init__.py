"""Losses on hidden states: cross-entropy and divergences that never hold the logits of a whole batch."""

from sdzero.losses.cross_entropy import cross_entropy_head
from sdzero.losses.divergence import LOG_ZERO, Divergence, Kind, Outside, Support, check_top_k, divergence_head

__all__ = [
    "LOG_ZERO",
    "Divergence",
    "Kind",
    "Outside",
    "Support",
    "check_top_k",
    "cross_entropy_head",
    "divergence_head",
]
