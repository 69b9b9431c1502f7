"""Losses on hidden states: cross-entropy and divergences that never hold the logits of a whole batch."""

from sdzero.losses.cross_entropy import cross_entropy_head
from sdzero.losses.divergence import Divergence, Kind, Outside, Support, divergence_head
from sdzero.losses.soft_targets import check_top_k

__all__ = ["Divergence", "Kind", "Outside", "Support", "check_top_k", "cross_entropy_head", "divergence_head"]
