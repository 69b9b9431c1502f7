"""Model FLOP utilisation of the teacher's and the student's pass over responses of one length.

    python benchmarks/passes.py [--tokens 4096] [--rows 2] [--rounds 5] [--attention sdpa] [--small]

The teacher's pass goes from tokens to hidden states, the student's from tokens to gradients through the divergence head
over the whole vocabulary. On a GPU the model has the shape of Qwen3-1.7B (`--shape 4b`: Qwen3-4B), random weights,
recomputed activations and bfloat16 computation, relative to the GPU's nominal rate; on a CPU it is small, relative to
the rate of a large matrix product in the same run. Recomputation does not count as work. Writes
results/passes.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import loops
import measure
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from sdzero.losses import Divergence, divergence_head
from sdzero.losses.soft_targets import hidden_targets
from sdzero.methods.batching import collate
from sdzero.models.language_model import LanguageModel


def shape(hidden: int, layers: int, heads: int, inner: int, head_dim: int, shared: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "head_dim": head_dim,
        "num_key_value_heads": shared,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }


SHAPES = {
    "tiny": shape(32, 1, 2, 32, 16, 1, 256),
    "cpu": shape(512, 4, 8, 1536, 64, 2, 32_768),
    "1.7b": shape(2048, 28, 16, 6144, 128, 8, 151_936),
    "4b": shape(2560, 36, 32, 9728, 128, 8, 151_936),
}
NOMINAL = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s of the data sheets."""


def flops(config: Qwen3Config, rows: int, length: int) -> float:
    """FLOP of a forward pass without the head: weights, and the causal half of attention."""
    hidden, layers, heads, inner = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads * config.head_dim,
        config.intermediate_size,
    )
    shared = config.num_key_value_heads * config.head_dim
    weights = layers * (2 * hidden * heads + 2 * hidden * shared + 3 * hidden * inner)
    return rows * length * (2 * weights + layers * 2 * heads * length)


def rate(device: torch.device) -> float:
    """FLOP/s: nominal for a known GPU, else measured on a large matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        if known := next((value for part, value in NOMINAL.items() if part in name), None):
            return known
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (row,) = measure.compare("bare product", {"product": lambda: a @ b}, "product", 5)
    return 2 * size**3 / row.wall_seconds


def passes(model: LanguageModel, rows: int, length: int) -> dict[str, Callable[[], Any]]:
    vocab, device = model.hf.config.vocab_size, loops.device()
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(3, vocab, (length - 16,), generator=generator).tolist()) for _ in range(rows)]
    packed = model.hf.config._attn_implementation.startswith(("flash_", "flex_"))
    batch = collate([(1,) * 16] * rows, ids, 0, packed).to(device)
    ones = torch.ones(len(batch.targets), device=device)

    @torch.no_grad()
    def teacher() -> Any:
        with loops.autocast():
            return model(batch.input_ids, batch.predicts, hidden_targets, batch.position_ids)

    states = teacher()
    states = dataclasses.replace(states, weight=states.weight.detach().clone())

    def student() -> None:
        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return divergence_head(hidden, weight, states, ones, len(ones), Divergence(), targets=batch.targets).loss

        with loops.autocast():
            model(batch.input_ids, batch.predicts, head, batch.position_ids).backward()
        model.zero_grad(set_to_none=True)

    return {"teacher": teacher, "student": student}


def main() -> None:
    parser = measure.parser(__doc__, rounds=5)
    device = loops.device()
    parser.add_argument("--tokens", type=int, default=4096 if device.type == "cuda" else 512, help="of a sequence")
    parser.add_argument("--rows", type=int, default=2, help="sequences of a micro batch")
    parser.add_argument("--shape", choices=SHAPES, default="1.7b" if device.type == "cuda" else "cpu")
    parser.add_argument("--attention", default="sdpa")
    given = parser.parse_args()
    if given.small:
        given.shape, given.tokens = "tiny", 32
    measure.one_thread()
    config = Qwen3Config(**SHAPES[given.shape], max_position_embeddings=32_768, dtype="float32")
    with torch.device(device):
        model = LanguageModel(AutoModelForCausalLM.from_config(config, attn_implementation=given.attention)).train()
    if device.type == "cuda":
        model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    work, peak = flops(config, given.rows, given.tokens), rate(device)
    head = 2 * given.rows * (given.tokens - 16) * config.vocab_size * config.hidden_size
    works = {"teacher": work, "student": 3 * work + 4 * head}
    case = f"{given.shape}, {given.rows} x {given.tokens:,}, {given.attention}"
    rows = measure.compare(case, passes(model, given.rows, given.tokens), "teacher", given.rounds)
    for row in rows:
        row.metrics["mfu"] = works[row.side] / row.wall_seconds / peak
        print(f"{row.case} {row.side}: MFU {row.metrics['mfu']:.1%}")
    settings = {"rounds": given.rounds, "peak_flops_per_second": peak, "parameters": model.hf.num_parameters()}
    about = "Model FLOP utilisation of the teacher's and the student's pass"
    measure.write("passes", about, settings, rows, given)


if __name__ == "__main__":
    main()
