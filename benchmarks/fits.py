"""Memory of large models on 1 to 64 GPUs, computed by `sdzero.pipeline.dry_run`: tables of docs/scaling.md.

    python benchmarks/fits.py

Step sizes are the paper's: SRT trains on 4 traces of 32,768 tokens (table 4); SelfDistill samples 128 responses of
8,192 tokens after prompts of 1,024 (table 6). Trained weights are float32, computation bfloat16, with gradient
checkpointing and FullShard over all GPUs. Nothing here is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from sdzero.pipeline.dry_run.assumptions import Architecture, load_assumptions
from sdzero.pipeline.dry_run.memory import GIB, Machine
from sdzero.pipeline.dry_run.sampling import engine, rollout_peak
from sdzero.pipeline.dry_run.training import resident, training_peaks
from sdzero.utils.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "configs/recipes"
LARGE: dict[str, dict[str, Any]] = {  # from their config.json
    "Qwen3-32B": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 25_600,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40_960,
    },
    "Llama-3.3-70B": {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28_672,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131_072,
    },
}
SMALLER = {"Qwen3-4B": "qwen3-4b-math", "Olmo-3-7B": "olmo3-7b-math"}  # sizes from a recipe's dry-run assumptions
NUM_GPUS = (1, 8, 16, 32, 64)
GPU_BYTES = int(79.1 * GIB)  # an 80 GB card as its driver reports it
PROMPT, RESPONSE = 1024, 8192
ENGINE_GPUS = {"Qwen3-4B": 1, "Olmo-3-7B": 1, "Qwen3-32B": 4, "Llama-3.3-70B": 8}
"""GPUs per engine: the fewest of 1, 4 and 8 on which the weights leave room for keys and values."""


@dataclass(frozen=True)
class Stage:
    """Examples per step, tokens of the longest one and of a micro batch."""

    examples: int
    longest: int
    micro_batch: int


STAGES = {"srt": Stage(4, 32_768, 32_768), "self_distill": Stage(128, PROMPT + 2 * RESPONSE, 20_480)}


@dataclass(frozen=True)
class Choice:
    """Settings of a row.

    Args:
        name: as in the table.
        settings: keys of `model.student`.
        teacher_bytes: bytes per element of the teacher; 0: the student without its adapters.
        reduces: `model.reduce_every_micro_batch`.
        tensor_parallel: `strategy.tensor_parallel_size`.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    teacher_bytes: int = 2
    reduces: bool = True
    tensor_parallel: int = 1


LORA = {"lora": {"rank": 16, "target_modules": "all-linear"}, "dtype": "bfloat16"}
CHOICES = {
    "srt": (
        Choice("all weights"),
        Choice("all weights, tensor parallel 8", tensor_parallel=8),
        Choice("all weights, `cpu_offload`", {"cpu_offload": True}),
        Choice("`lora`, bfloat16 base", LORA),
    ),
    "self_distill": (
        Choice("teacher float32, gradients summed once a step", teacher_bytes=4, reduces=False),
        Choice("teacher bfloat16, gradients summed once a step", reduces=False),
        Choice("teacher bfloat16, `reduce_every_micro_batch`"),
        Choice("the same, tensor parallel 8", tensor_parallel=8),
        Choice("the same, `cpu_offload` of both", {"cpu_offload": True}),
        Choice("`lora`, bfloat16 base", LORA, teacher_bytes=0),
    ),
}


@cache
def models() -> dict[str, Architecture]:
    sizes = {}
    for name, recipe in SMALLER.items():
        assumptions = load_assumptions(load_recipe(RECIPES / recipe))
        assert assumptions is not None
        sizes[name] = assumptions.model
    return {name: Architecture(AutoConfig.for_model(**values)) for name, values in {**sizes, **LARGE}.items()}


def machine_of(choice: Choice, num_gpus: int) -> Machine:
    return Machine(True, num_gpus, num_gpus, 2, choice.tensor_parallel, wrapped=True)


def settings_of(choice: Choice) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "cpu_offload": False, "dtype": "float32", **choice.settings}


def largest(stage: str, model: Architecture, choice: Choice, num_gpus: int) -> tuple[int, str]:
    """Bytes of a GPU at the memory peak of training, and the name of that peak."""
    at, sizes = machine_of(choice, num_gpus), STAGES[stage]
    arguments: dict[str, Any] = {"student": settings_of(choice), "optimizer": {"init_args": {"fused": True}}}
    arguments["reduce_every_micro_batch"] = choice.reduces
    teacher = (model, choice.teacher_bytes) if stage == "self_distill" else None
    on_rank = math.ceil(sizes.examples * choice.tensor_parallel / num_gpus)
    accumulates = on_rank > 1 and on_rank * sizes.longest > sizes.micro_batch
    config = {"model": {"init_args": arguments}}
    peaks = training_peaks(stage, config, model, teacher, at, sizes.micro_batch, accumulates)
    peak = max(peaks, key=lambda one: one.total)
    return peak.total, peak.name


def table(stage: str) -> str:
    """Table of a stage: GiB of a GPU at the memory peak of training."""
    lines = ["| model | | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in NUM_GPUS) + " |"]
    lines.append("|---|---|" + "--:|" * len(NUM_GPUS))
    for name, model in models().items():
        for i, choice in enumerate(CHOICES[stage]):
            cells = [_cell(stage, model, choice, n) for n in NUM_GPUS]
            lines.append(f"| {name if i == 0 else ''} | {choice.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(stage: str, model: Architecture, choice: Choice, num_gpus: int) -> str:
    if num_gpus % choice.tensor_parallel:
        return "-"
    size, peak = largest(stage, model, choice, num_gpus)
    text = f"{size / GIB:.0f} {peak[0]}"
    return f"**{text}**" if size <= GPU_BYTES else text


def engines_table() -> str:
    """Table of the largest gpu_memory_utilization beside a sharded SelfDistill, and the longest sequences it holds."""
    lines = ["| model | | GPUs of an engine | " + " | ".join(f"{n} GPUs" for n in NUM_GPUS[1:]) + " |"]
    lines.append("|---|---|--:|" + "--:|" * len(NUM_GPUS[1:]))
    chosen = [choice for choice in CHOICES["self_distill"] if choice.name.startswith(("teacher bfloat16, `", "`lora"))]
    for name, model in models().items():
        for i, choice in enumerate(chosen):
            cells = [_room(model, choice, ENGINE_GPUS[name], n) for n in NUM_GPUS[1:]]
            start = f"| {name if i == 0 else ''} | {choice.name.replace(', `reduce_every_micro_batch`', '')} "
            lines.append(f"{start}| {ENGINE_GPUS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _room(model: Architecture, choice: Choice, engine_gpus: int, num_gpus: int) -> str:
    at, longest = machine_of(choice, num_gpus), PROMPT + 2 * RESPONSE
    kept = resident(model, (model, choice.teacher_bytes), at, settings_of(choice))
    for percent in range(95, 0, -5):
        options = {"gpu_memory_utilization": percent / 100, "tensor_parallel_size": engine_gpus, "max_num_seqs": 256}
        spec = {"class_path": "sdzero.engines.VLLMEngine", "init_args": options}
        beside = engine(spec, "bfloat16", model, at, longest, 0, GPU_BYTES)
        assert beside is not None and beside.cache is not None
        peak = rollout_peak("self_distill", model, kept, at, beside, PROMPT + RESPONSE)
        if peak.total <= GPU_BYTES:
            held = max(beside.cache, 0) // beside.per_longest
            return f"{percent / 100:.2f}: {held}" if held else "none"
    return "none"


def measured_table(results: Path) -> str:
    """Table of the peaks that benchmarks/memory.py measured, beside the computed ones."""
    result = json.loads((results / "memory.json").read_text())
    head = f"torch {result['machine']['packages']['torch']}, {result['date']}. MiB of a process."
    lines = [head, "", "| training | phase | measured | by arithmetic | ratio |", "|---|---|--:|--:|--:|"]
    for i, row in enumerate(result["rows"]):
        name = row["case"] if i == 0 or result["rows"][i - 1]["case"] != row["case"] else ""
        sizes = f"{row['measured'] / 2**20:.1f} | {row['said'] / 2**20:.1f}"
        lines.append(f"| {name} | {row['phase']} | {sizes} | {row['ratio']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table("srt"), table("self_distill"), engines_table(), sep="\n\n")
