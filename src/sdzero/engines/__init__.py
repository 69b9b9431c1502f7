"""Rollout engines: each samples from its own copy of the policy's weights."""
