"""Assumptions of a dry run: dry_run.yaml, and the model's architecture, of which no weight is read."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from sdzero.pipeline.dry_run.stage import Config
from sdzero.utils.recipe import Recipe
from sdzero.utils.yaml_config import load_config, merge

ASSUMPTIONS = "dry_run.yaml"


@dataclass(frozen=True)
class Assumptions:
    """dry_run.yaml of a recipe, with the one of the folder that it extends beneath.

    Args:
        mean_response_tokens: mean length of a response of the base model, and of a revision.
        phase2_response_tokens: largest mean length of a response of phase 2.
        max_prompt_tokens: length of the longest prompt, a control phrase included.
        num_gpus: GPUs that `trainer.devices: auto` finds, on all nodes.
        gpu_memory_gib: memory of each GPU.
        model: `model_type` and sizes, as in the model's config.json.
        correct_share: share of correct first attempts; null: unknown.
        eval_questions: questions of an evaluation on all there are (num_questions: null); null: unknown.
    """

    mean_response_tokens: int
    phase2_response_tokens: int
    max_prompt_tokens: int
    num_gpus: int
    gpu_memory_gib: float
    model: dict[str, Any]
    correct_share: float | None = None
    eval_questions: int | None = None


SIZES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)
"""Keys that `model` of dry_run.yaml must have; further ones of config.json, such as sliding_window, may follow."""


def load_assumptions(recipe: Recipe) -> Assumptions | None:
    """dry_run.yaml of a recipe; None without one.

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


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder. Parameters are counted once where they are tied.

    Attributes:
        num_parameters: all parameters.
        num_layer_parameters: parameters of one decoder layer.
        num_layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        queries: heads x head_dim.
        keys: key-value heads x head_dim.
        num_key_heads: key-value heads.
        vocab: entries of the vocabulary.
        max_positions: longest sequence.
        num_sliding_layers: layers that attend to the last `window` tokens only.
        window: their window; 0 without such layers.
    """

    num_parameters: int
    num_layer_parameters: int
    num_layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    num_key_heads: int
    vocab: int
    max_positions: int
    num_sliding_layers: int = 0
    window: int = 0

    @property
    def num_root_parameters(self) -> int:
        """Embedding, final norm and head."""
        return self.num_parameters - self.num_layers * self.num_layer_parameters

    def num_adapter_parameters(self, lora: Config) -> int:
        """Parameters of `student.lora`: rank x (in + out) per adapted linear layer, under the usual layer names."""
        sides = {name: self.hidden + self.intermediate for name in ("gate_proj", "up_proj", "down_proj")}
        sides |= {name: self.hidden + self.queries for name in ("q_proj", "o_proj")}
        sides |= {name: self.hidden + self.keys for name in ("k_proj", "v_proj")}
        chosen = sides if lora["target_modules"] == "all-linear" else lora["target_modules"]
        return lora["rank"] * self.num_layers * sum(sides.get(name, 0) for name in chosen)

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Architecture of a transformers config; its model is built on the meta device, without memory."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or []
        num_sliding = sum(kind == "sliding_attention" for kind in kinds)
        return cls(
            num_parameters=sum(p.numel() for p in model.parameters()),
            num_layer_parameters=sum(p.numel() for p in layers[0].parameters()),
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            queries=config.num_attention_heads * head_dim,
            keys=config.num_key_value_heads * head_dim,
            num_key_heads=config.num_key_value_heads,
            vocab=config.vocab_size,
            max_positions=config.max_position_embeddings,
            num_sliding_layers=num_sliding,
            window=config.sliding_window if num_sliding else 0,
        )


def load_architecture(path: str, assumptions: Assumptions | None) -> Architecture | None:
    """Architecture of the model folder at `path`, else of dry_run.yaml; None without both. Nothing is downloaded.

    Raises:
        ValueError: dry_run.yaml names a model_type that transformers does not have.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if (Path(path) / "config.json").is_file():
        return Architecture.of(AutoConfig.from_pretrained(path, local_files_only=True))
    if assumptions is None:
        return None
    if assumptions.model["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"{ASSUMPTIONS}: model.model_type {assumptions.model['model_type']!r} is not one of transformers'"
        )
    return Architecture.of(AutoConfig.for_model(**assumptions.model))
