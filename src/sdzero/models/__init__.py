"""The language model: loading, adapters, sharding, weights, export."""
