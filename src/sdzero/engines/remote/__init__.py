"""vLLM servers as rollout engine: engine, HTTP client, server requirements, weight transfer."""
