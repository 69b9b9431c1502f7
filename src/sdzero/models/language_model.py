"""Model config and loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sdzero.models.lora import Lora, add_adapters, check_installed
from sdzero.prompts import ControlPhrases, PromptBuilder
from sdzero.utils.seeds import derive_seed

PACKING = ("flash_", "flex_")
"""Prefixes of the attention implementations that separate the sequences of a packed row by position, at no cost."""

Output = TypeVar("Output")
Head = Callable[[Tensor, Tensor], Output]


@dataclass
class ModelConfig:
    """A model folder or hub id, and how it is loaded.

    Args:
        path: model folder in Hugging Face format, or a hub id.
        weights: `pretrained` reads the weights; `random` initialises them from the run's seed.
        dtype: dtype of the weights in memory. Trained weights must be `float32`: the Trainer's precision
            (`bf16-mixed`) sets the dtype of the computation. Frozen weights may be `bfloat16`: a teacher's, and those
            beside adapters, which are `float32` themselves.
        system: system message, null for the template's own default.
        control_phrases: P_0 and P_1 of the paper's section 2.1.
        chat_template_kwargs: passed to the chat template, e.g. `{enable_thinking: false}`.
        attn_implementation: attention of `transformers`, e.g. `sdpa`, `eager`, `flash_attention_2`, `flex_attention`.
            With the flash and flex kinds a micro batch is one packed row of sequences without padding; with the
            others it is padded rows of similar length.
        gradient_checkpointing: recompute activations in the backward pass.
        layer_classes: class names of the layers that are sharded individually; null takes the model's own.
        cpu_offload: keep sharded weights and optimizer state in host memory.
        lora: train adapters beside the frozen weights; null trains the weights. Needs the extra `lora`.
    """

    path: str
    weights: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16"] = "float32"
    system: str | None = None
    control_phrases: ControlPhrases = field(default_factory=ControlPhrases)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    layer_classes: list[str] | None = None
    cpu_offload: bool = False
    lora: Lora | None = None

    @property
    def packs(self) -> bool:
        """Return whether the attention skips other sequences of the same row, so that micro batches are packed."""
        return self.attn_implementation.startswith(PACKING)

    def check_path(self) -> None:
        """Raise FileNotFoundError if the path looks like a folder and has no config.json."""
        path = Path(self.path)
        looks_local = path.is_absolute() or self.path.startswith(".") or self.path.count("/") != 1 or path.exists()
        if looks_local and not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"student.path: no model folder at {self.path!r} (no config.json there). "
                "If an earlier stage writes it, run that stage first: `sdzero run RECIPE_DIR` runs them in order"
            )

    def builder(self) -> PromptBuilder:
        """Return a prompt builder. Raises: FileNotFoundError if there is no model, or the hub cannot be reached."""
        self.check_path()
        try:
            return PromptBuilder.from_pretrained(
                self.path,
                system=self.system,
                control_phrases=self.control_phrases,
                chat_template_kwargs=self.chat_template_kwargs,
            )
        except OSError as error:
            message = f"student.path: {self.path!r} cannot be read: {error}"
            raise FileNotFoundError(message.partition("\n")[0]) from error

    def hf_config(self) -> Any:
        """Return the model's Hugging Face config."""
        from transformers import AutoConfig

        self.check_path()
        return AutoConfig.from_pretrained(self.path)


def max_positions(hf_config: Any) -> int:
    """Return a model's maximum sequence length in tokens; 2**31 where its config sets no limit."""
    return getattr(hf_config, "max_position_embeddings", None) or 2**31


class LanguageModel(nn.Module):
    """A Hugging Face causal LM whose forward pass ends in a loss head instead of logits.

    The head is called inside the forward pass, where sharded weights are gathered.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        head, config = hf.get_output_embeddings(), hf.config
        scaled = [k for k in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, k, None)]
        if head.bias is not None or scaled:
            raise ValueError(f"{config.model_type} changes its logits after the head ({scaled or 'bias'}): unsupported")
        self.hf = hf

    def forward(
        self, input_ids: Tensor, predicts: Tensor, head: Head[Output], position_ids: Tensor | None = None
    ) -> Output:
        """Return `head(hidden [N, H], weight [V, H])` at the N positions where `predicts` [B, T] is true.

        `position_ids` [1, T] restart at 0 with each sequence of a packed row.
        """
        decoder = self.hf.get_decoder()
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        return head(hidden[predicts], self.hf.get_output_embeddings().weight)


def load(config: ModelConfig, seed: int) -> LanguageModel:
    """Load the model of `config` on the CPU, in training mode, with weights of `config.dtype`."""
    from transformers import AutoModelForCausalLM

    config.check_path()
    if config.lora is not None:
        check_installed()
    options = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation}
    # Lightning sets the accelerator as default device: random weights would depend on it, and transformers
    # would need accelerate to load weights onto it
    with torch.device("cpu"), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive_seed(seed, "weights"))
        if config.weights == "pretrained":
            hf = AutoModelForCausalLM.from_pretrained(config.path, **options)
        else:
            hf = AutoModelForCausalLM.from_config(config.hf_config(), **options)
        if config.lora is not None:
            torch.manual_seed(derive_seed(seed, "adapters"))
            add_adapters(hf, config.lora)
    if config.gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return LanguageModel(hf).train()  # from_pretrained returns eval mode, which disables checkpointing
