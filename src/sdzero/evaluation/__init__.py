"""Metrics and statistics of evaluations; light, without torch."""
