"""The rollout engine beside a training, as vLLM sizes itself, and what sampling needs in all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdzero.pipeline.dry_run.assumptions import Architecture
from sdzero.pipeline.dry_run.memory import FLOAT32, GIB, OTHER, Engine, Machine, MemoryPeak
from sdzero.pipeline.dry_run.training import gathered_bytes, logit_bytes

BATCHED_TOKENS = 16384
"""Tokens that vLLM's scheduler takes at once on a GPU of 70 GiB and more: the largest of its defaults."""


def cache_bytes(model: Architecture, num_tokens: int, dtype_bytes: int, tensor_parallel_size: int = 1) -> int:
    """Return the bytes of one sequence's keys and values on one GPU. A sliding layer holds its window and what vLLM
    takes at once."""
    per_layer = 2 * model.keys * dtype_bytes // min(tensor_parallel_size, model.num_key_heads)
    in_window = min(num_tokens, model.window - 1 + BATCHED_TOKENS)
    full = model.num_layers - model.num_sliding_layers
    return per_layer * (full * num_tokens + model.num_sliding_layers * in_window)


def engine(
    spec: Mapping[str, Any], dtype: str, model: Architecture, at: Machine, longest: int, mean: int, memory: int | None
) -> Engine | None:
    """Return the engine of a stage; None if its class is unknown here or the GPU's memory is.

    Args:
        spec: the engine's class_path and init_args.
        dtype: of its weights.
        model: the policy.
        at: what it runs on.
        longest: tokens of the longest sequence.
        mean: tokens of a mean one; 0: not known.
        memory: bytes of a GPU.
    """
    kind, options = spec["class_path"].rpartition(".")[2], spec.get("init_args", {})
    dtype_bytes = 2 if dtype == "bfloat16" else FLOAT32
    tensor_parallel = options.get("tensor_parallel_size", 1)
    weights = model.num_parameters * dtype_bytes // tensor_parallel
    per_longest, per_mean = (cache_bytes(model, n, dtype_bytes, tensor_parallel) for n in (longest, mean))
    if kind == "TransformersEngine":
        return Engine(weights + options["max_batch_size"] * per_longest, weights, longest, None, per_longest, per_mean)
    if kind != "VLLMEngine" or (at.on_gpu and memory is None):
        return None
    if not at.on_gpu:
        cache = int(options["kv_cache_gib"] * GIB)
        return Engine(weights + cache, weights, longest, cache, per_longest, per_mean)
    size = int(options["gpu_memory_utilization"] * (memory or 0))
    # what vLLM's trial run takes: the MLP of all tokens it may take at once, and the sampler's logits
    trial = BATCHED_TOKENS * (3 * model.intermediate + 4 * model.hidden) * dtype_bytes // tensor_parallel
    trial += 3 * options["max_num_seqs"] * model.vocab * FLOAT32
    return Engine(size, weights, longest, size - weights - trial, per_longest, per_mean)


def rollout_peak(
    stage: str, model: Architecture, kept: Mapping[str, int] | None, at: Machine, beside: Engine, longest_response: int
) -> MemoryPeak:
    """Return the memory peak of sampling: `resident` parts, the engine, and the trainer's check of a longest response's
    log-probabilities while the engine is awake. `kept` None: collection, which has no trainer."""
    parts = {**(kept or {}), "engine": beside.size, "other": OTHER if at.on_gpu else 0}
    if kept:
        per_token = 8 * model.hidden + 3 * model.intermediate * at.compute_bytes // at.tensor_parallel
        parts["activations"] = longest_response * per_token + logit_bytes(model, longest_response, at, False)
        root, layer = gathered_bytes(model, at)
        parts["copies"] = (2 if kept.get("teacher") else 1) * root + 2 * layer  # the teacher's stays gathered
    return MemoryPeak(stage, "rollout", parts, beside)
