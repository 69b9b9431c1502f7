"""vLLM servers as rollout engine: the engine, its HTTP client, what servers must offer, how weights reach them."""

from sdzero.engines.remote.engine import RemoteVLLMEngine

__all__ = ["RemoteVLLMEngine"]
