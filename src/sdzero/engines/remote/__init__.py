"""vLLM servers as rollout engine: engine, HTTP client, server requirements, weight transfer."""

from sdzero.engines.remote.engine import RemoteVLLMEngine

__all__ = ["RemoteVLLMEngine"]
