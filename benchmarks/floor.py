"""Lower bound on the time of a step of phase 2, from the model's shape and a GPU's data sheet.

    python benchmarks/floor.py

Training: the student's forward and backward pass and the teacher's over x + y + P_r + y at a fraction of the nominal
FLOP/s; recomputed activations would add a third of the student's. Sampling: every decoding step reads all weights and
the keys and values of all responses at the nominal memory bandwidth, all responses at once. vLLM needs more.

Padding: fraction of a step's positions without a token, for made-up lengths.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

from sdzero.methods.batching import micro_batches
from sdzero.types import Example

H100_FLOPS, H100_BYTES = 989e12, 3.35e12
"""Dense bfloat16 FLOP/s and memory bytes/s of the SXM card's data sheet."""
MFU = 0.5
"""Model FLOP utilisation of good training code."""


@dataclass(frozen=True)
class Step:
    """Shape of a model and sizes of a step; defaults are those of Qwen3-4B and of table 6."""

    hidden: int = 2560
    layers: int = 36
    heads: int = 32
    shared_heads: int = 8
    head_dim: int = 128
    inner: int = 9728
    vocab: int = 151_936
    responses: int = 128
    prompt: int = 200
    response: int = 4096

    @property
    def weights(self) -> int:
        """Weights of the layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.shared_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    def forward(self, length: int) -> float:
        """FLOP of one sequence without the head; causality leaves half of the attention."""
        return length * (2 * self.weights + 2 * self.layers * self.heads * self.head_dim * length)

    @property
    def student(self) -> float:
        return self.responses * 3 * self.forward(self.prompt + self.response)

    @property
    def teacher(self) -> float:
        return self.responses * self.forward(self.prompt + 2 * self.response)

    @property
    def head(self) -> float:
        """The four products of the divergence head."""
        return self.responses * self.response * 4 * 2 * self.hidden * self.vocab

    def decoding(self, gpus: int) -> float:
        """Seconds of sampling."""
        weights = 2 * (self.weights + self.hidden * self.vocab)
        cache = 2 * 2 * self.layers * self.shared_heads * self.head_dim * (self.prompt + self.response / 2)
        return self.response * (weights + self.responses / gpus * cache) / H100_BYTES


def table() -> str:
    step = Step()
    total = step.student + step.teacher + step.head
    lines = ["| | products (FLOP) | share | 1 H100 | 8 H100 |", "|---|---|---|---|---|"]
    for name, work in (
        ("student, forward and backward", step.student),
        ("teacher, forward", step.teacher),
        ("divergence head, 4 products", step.head),
        ("training, all", total),
    ):
        seconds = work / (MFU * H100_FLOPS)
        lines.append(f"| {name} | {work:.2g} | {work / total:.0%} | {seconds:.1f} s | {seconds / 8:.1f} s |")
    lines.append(f"| decoding, memory alone | | | {step.decoding(1):.0f} s | {step.decoding(8):.0f} s |")
    return "\n".join(lines)


def lengths(num: int, seed: int) -> list[int]:
    """Response lengths: log-normal around 2,000 tokens with spread 0.8, cut at 8,192."""
    rng = random.Random(seed)
    return [min(8192, max(16, int(rng.lognormvariate(7.6, 0.8)))) for _ in range(num)]


def padding_table(budget: int = 20_480, prompt: int = 200, seeds: int = 20) -> str:
    """Means over seeds, for the teacher's sequences x + y + P_r + y."""
    lines = [
        "| responses of a rank | padded to the longest | sorted | micro batches | packed |",
        "|---|---|---|---|---|",
    ]
    for num in (128, 32, 16):
        whole, by_length, counts, packed = [], [], [], []
        for seed in range(seeds):
            examples = [
                Example(str(i), (0,) * prompt, (0,) * n, teacher_context=(0,) * (prompt + n + 12))
                for i, n in enumerate(lengths(num, seed))
            ]
            used = sum(e.length for e in examples)
            batches = micro_batches(examples, budget)
            whole.append(1 - used / (num * max(e.length for e in examples)))
            by_length.append(1 - used / sum(len(b) * b[0].length for b in batches))
            counts.append(len(batches))
            packed.append(len(micro_batches(examples, budget, packed=True)))
        shares = " | ".join(f"{statistics.mean(s):.0%}" for s in (whole, by_length))
        lines.append(f"| {num} | {shares} | {statistics.mean(counts):.1f} | {statistics.mean(packed):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), padding_table(), sep="\n\n")
