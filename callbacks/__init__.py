"""Callbacks: what a run may watch or do beside its method. None relies on another."""
