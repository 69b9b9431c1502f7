"""Assumptions of a dry run: dry_run.yaml, and the model's architecture, of which no weight is read."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from sdzero.utils.recipe import Recipe
from sdzero.utils.yaml_config import Config, load_config, merge

ASSUMPTIONS = "dry_run.yaml"


@dataclass(frozen=True)
class Assumptions:
    """dry_run.yaml of a recipe, with the one of the folder that it extends beneath."""

    mean_response_tokens: int  # mean length of a response of the base model, and of a revision
    phase2_response_tokens: int  # largest mean length of a response of phase 2
    max_prompt_tokens: int  # length of the longest prompt, a control phrase included
    num_gpus: int  # GPUs that `trainer.devices: auto` finds, on all nodes
    gpu_memory_gib: float  # memory of each GPU
    model: dict[str, Any]  # `model_type` and sizes, as in the model's config.json
    correct_share: float | None = None  # share of correct first attempts; null: unknown
    eval_questions: int | None = None  # questions of an evaluation on all there are; null: unknown


SIZES = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "tie_word_embeddings", "max_position_embeddings"),
)
"""Keys that `model` of dry_run.yaml must have; further ones of config.json, such as sliding_window, may follow."""


def load_assumptions(recipe: Recipe) -> Assumptions | None:
    """Read dry_run.yaml of a recipe; None without one.

    Raises:
        ValueError: a key is unknown, missing or not a positive number.
    """
    files = [file for layer in recipe.layers if (file := layer.folder / ASSUMPTIONS).is_file()]
    if not files:
        return None
    path, values = files[-1], reduce(merge, map(load_config, files))
    known = {field.name: field for field in fields(Assumptions)}
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"{path}: unknown key {unknown[0]}; it has {', '.join(known)}")
    if missing := [name for name, f in known.items() if f.default is MISSING and name not in values]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    for name, value in values.items():
        optional = value is None and known[name].default is None
        if name != "model" and not optional and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{path}: {name} must be a number above 0, got {value!r}")
    if missing := [name for name in SIZES if name not in values["model"]]:
        raise ValueError(f"{path}: model.{missing[0]} is missing; the model's config.json has it")
    return Assumptions(**values)


class Architecture:
    """Sizes of a decoder. Parameters are counted once where they are tied.

    Args:
        config: the model's transformers config; the model is built on the meta device, without memory.
    """

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or []
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_layer_parameters = sum(p.numel() for p in layers[0].parameters())
        self.num_layers: int = config.num_hidden_layers
        self.num_root_parameters = self.num_parameters - self.num_layers * self.num_layer_parameters
        """Embedding, final norm and head."""
        self.hidden: int = config.hidden_size
        self.intermediate: int = config.intermediate_size
        self.queries: int = config.num_attention_heads * head_dim
        self.keys: int = config.num_key_value_heads * head_dim
        self.num_key_heads: int = config.num_key_value_heads
        self.vocab: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self.num_sliding_layers = sum(kind == "sliding_attention" for kind in kinds)
        self.window: int = config.sliding_window if self.num_sliding_layers else 0
        """Last tokens that a sliding layer attends to."""

    def num_trained(self, student: Config) -> int:
        """Trained parameters under `model.student`: all, or rank x (in + out) of each linear layer with an adapter."""
        if not (lora := student.get("lora")):
            return self.num_parameters
        sides = {name: self.hidden + self.intermediate for name in ("gate_proj", "up_proj", "down_proj")}
        sides |= {name: self.hidden + self.queries for name in ("q_proj", "o_proj")}
        sides |= {name: self.hidden + self.keys for name in ("k_proj", "v_proj")}
        chosen = sides if lora["target_modules"] == "all-linear" else lora["target_modules"]
        return lora["rank"] * self.num_layers * sum(sides.get(name, 0) for name in chosen)


def load_architecture(path: str, assumptions: Assumptions | None) -> Architecture | None:
    """Read the architecture of the model folder at `path`, else of dry_run.yaml; None without both. No download.

    Raises:
        ValueError: dry_run.yaml names a model_type that transformers does not have.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if (Path(path) / "config.json").is_file():
        return Architecture(AutoConfig.from_pretrained(path, local_files_only=True))
    if assumptions is None:
        return None
    if assumptions.model["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"{ASSUMPTIONS}: model.model_type {assumptions.model['model_type']!r} is not one of transformers'"
        )
    return Architecture(AutoConfig.for_model(**assumptions.model))
