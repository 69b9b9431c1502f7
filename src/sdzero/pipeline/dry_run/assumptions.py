"""What only a run would tell: plan.yaml, and the model's architecture, of which no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

Config = Mapping[str, Any]
"""A stage's whole config, with all defaults in it."""


@dataclass(frozen=True)
class Assumptions:
    """plan.yaml of a recipe.

    Args:
        mean_response_tokens: mean length of a response of the base model, and of a revision.
        phase2_response_tokens: the most that a response of phase 2 has on average.
        max_prompt_tokens: the longest prompt, a control phrase included.
        num_gpus: GPUs that `trainer.devices: auto` finds, on all nodes.
        gpu_memory_gib: memory of each.
        model: `model_type` and sizes, as in the model's config.json.
        correct_share: share of first attempts that are right; null: unknown.
        eval_questions: questions of eval.yaml where it asks all there are (num_questions: null); null: unknown.
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
"""The keys that `model` of plan.yaml must have; further ones of config.json, such as sliding_window, may follow."""


def load_assumptions(recipe: Path) -> Assumptions | None:
    """plan.yaml of a recipe; None without one.

    Raises:
        ValueError: a key is unknown, missing or no positive number.
    """
    path = recipe / "plan.yaml"
    if not path.is_file():
        return None
    values: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
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
        num_parameters: all.
        num_layer_parameters: of one decoder layer.
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
        """Embedding, final norm and head: what is no decoder layer."""
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
        """Of a transformers config; its model is built on the meta device, without memory."""
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
    """Of the model folder at `path`; else of plan.yaml; None without both. Nothing is downloaded.

    Raises:
        ValueError: plan.yaml names a model_type that transformers does not have.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if (Path(path) / "config.json").is_file():
        return Architecture.of(AutoConfig.from_pretrained(path, local_files_only=True))
    if assumptions is None:
        return None
    if assumptions.model["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"plan.yaml: model.model_type {assumptions.model['model_type']!r} is none of transformers'")
    return Architecture.of(AutoConfig.for_model(**assumptions.model))
