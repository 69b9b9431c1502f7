"""Losses from hidden states: cross-entropy and divergences, without the logits of a whole batch in memory."""

from sdzero.losses.divergence import LOG_ZERO, Divergence, Kind, Outside, Support, cross_entropy_head, divergence_head

__all__ = ["LOG_ZERO", "Divergence", "Kind", "Outside", "Support", "cross_entropy_head", "divergence_head"]
