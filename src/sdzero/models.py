"""Load a causal language model, shard it, hand out its full weights, export it, name it by a hash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor

from sdzero.prompts import ControlPhrases, PromptBuilder
from sdzero.seeds import derive_seed

PACKING = ("flash_", "flex_")
"""How the names of the attentions begin that find the sequences of a packed row by their positions, at no cost."""

Output = TypeVar("Output")
Head = Callable[[Tensor, Tensor], Output]


@dataclass
class ModelConfig:
    """Which model, and how it is read.

    Args:
        path: model folder in Hugging Face format, or a hub id.
        weights: `pretrained` reads the weights; `random` initialises them from the run's seed.
        dtype: dtype of the weights in memory. Trained weights must be `float32`: the Trainer's precision
            (`bf16-mixed`) is what makes the computation bfloat16. A frozen teacher may be `bfloat16`.
        system: system message, null for the template's own default.
        control_phrases: P_0 and P_1 of the paper's section 2.1.
        chat_template_kwargs: passed to the chat template, e.g. `{enable_thinking: false}`.
        attn_implementation: attention of `transformers`, e.g. `sdpa`, `eager`, `flash_attention_2`, `flex_attention`.
            Those of the flash and flex kind skip what a sequence must not see: a micro batch is then one row that
            holds all its sequences, without padding. The others get padded rows, neighbours in length together.
        gradient_checkpointing: recompute activations in the backward pass.
        layer_classes: class names of the layers to shard one by one; null takes the model's own.
        cpu_offload: keep sharded weights and optimizer state in host memory.
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

    @property
    def packs(self) -> bool:
        """Whether attention costs nothing between the sequences of one row, so that they need no row each."""
        return self.attn_implementation.startswith(PACKING)

    def check_path(self) -> None:
        """A path that looks like a folder must be a model folder.

        Raises:
            FileNotFoundError: the folder, or its config.json, is not there.
        """
        path = Path(self.path)
        looks_local = path.is_absolute() or self.path.startswith(".") or self.path.count("/") != 1 or path.exists()
        if looks_local and not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"model.path: no model folder at {self.path!r} (no config.json there). "
                "If an earlier stage writes it, run that stage first: `sdzero run RECIPE_DIR` runs them in order"
            )

    def builder(self) -> PromptBuilder:
        """Raises: FileNotFoundError where the hub does not have the model, or is out of reach."""
        self.check_path()
        try:
            return PromptBuilder.from_pretrained(
                self.path,
                system=self.system,
                control_phrases=self.control_phrases,
                chat_template_kwargs=self.chat_template_kwargs,
            )
        except OSError as error:
            raise FileNotFoundError(f"model.path: {self.path!r} cannot be read: {error}".partition("\n")[0]) from error

    def hf_config(self) -> Any:
        from transformers import AutoConfig

        self.check_path()
        return AutoConfig.from_pretrained(self.path)


class LanguageModel(nn.Module):
    """A Hugging Face causal LM whose forward pass ends in a loss head instead of in logits.

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
        """`head(hidden [N, H], weight [V, H])` of the positions chosen by `predicts`, both [B, T].

        `position_ids` [1, T] start again at 0 with each sequence of a packed row.
        """
        decoder = self.hf.get_decoder()
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        return head(hidden[predicts], self.hf.get_output_embeddings().weight)


def load(config: ModelConfig, seed: int) -> LanguageModel:
    """The model of `config` on the CPU, in training mode, its weights of `config.dtype`."""
    from transformers import AutoModelForCausalLM

    config.check_path()
    options = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation}
    # Lightning calls with the accelerator as default device: random weights would depend on it, and transformers
    # would want a further library to read weights straight onto it
    with torch.device("cpu"), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive_seed(seed, "weights"))
        if config.weights == "pretrained":
            hf = AutoModelForCausalLM.from_pretrained(config.path, **options)
        else:
            hf = AutoModelForCausalLM.from_config(config.hf_config(), **options)
    if config.gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return LanguageModel(hf).train()  # from_pretrained returns eval mode, where checkpointing does nothing


def _layers(model: LanguageModel, config: ModelConfig) -> list[nn.Module]:
    names = set(config.layer_classes or model.hf._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise ValueError(f"model.layer_classes: no layer of {sorted(names)} in {type(model.hf).__name__}")
    return layers


def shard_fsdp2(model: LanguageModel, config: ModelConfig, mesh: Any, compute_dtype: torch.dtype | None) -> nn.Module:
    """FSDP2: every decoder layer and the root. The root stays gathered after its forward pass, head included."""
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    }
    for layer in _layers(model, config):
        fully_shard(layer, **options)
    fully_shard(model, reshard_after_forward=False, **options)  # in place
    return model


def shard_fsdp1(
    model: LanguageModel, config: ModelConfig, device: torch.device, compute_dtype: torch.dtype | None
) -> nn.Module:
    """FSDP1, full shard: every decoder layer and the root."""
    from torch.distributed.fsdp import CPUOffload, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FSDP1(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in _layers(model, config)}),
        mixed_precision=MixedPrecision(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        cpu_offload=CPUOffload(offload_params=config.cpu_offload),
        device_id=device,
        use_orig_params=True,
    )


def unwrap(model: nn.Module) -> LanguageModel:
    inner = model.module if isinstance(model, FSDP1) else model
    assert isinstance(inner, LanguageModel)
    return inner


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full detached tensor) of each weight once, tied ones under their first name.

    Collective where the model is sharded: every rank must consume the whole iterator.
    """
    reshard(model)
    gathered = FSDP1.summon_full_params(model, writeback=False) if isinstance(model, FSDP1) else nullcontext()
    with gathered, torch.no_grad():
        for name, parameter in unwrap(model).hf.named_parameters():
            tensor = parameter.detach()
            name = name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def lerp_weights(target: nn.Module, source: nn.Module, weight: float) -> None:
    """target += weight * (source - target), shard by shard; 1.0 copies exactly. Collective under FSDP1."""
    reshard(target)
    reshard(source)
    with ExitStack() as gathered, torch.no_grad():
        if isinstance(target, FSDP1):  # its root keeps a gathered copy, which would hide the update
            gathered.enter_context(FSDP1.summon_full_params(target, writeback=True))
            gathered.enter_context(FSDP1.summon_full_params(source, writeback=False))
        for into, of in zip(target.parameters(), source.parameters(), strict=True):
            value = of.detach().to(into.dtype)
            into.copy_(value) if weight == 1.0 else into.lerp_(value, weight)


def reshard(model: nn.Module) -> None:
    """Drops gathered FSDP2 copies: they may be stale, or in the computation's dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def export(model: nn.Module, builder: PromptBuilder, folder: Path, is_writer: bool, manifest: dict[str, Any]) -> None:
    """Writes a Hugging Face folder that vLLM and transformers load, whole or not at all. Collective.

    `manifest` goes into its sdzero.json, with the weights' hash added.
    """
    weights = {name: tensor.cpu().clone() for name, tensor in full_weights(model) if is_writer}
    if not is_writer:
        return
    manifest = {**manifest, "weights_sha256": weights_sha256(weights.items())}
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    hf = unwrap(model).hf
    hf.save_pretrained(staging, state_dict=weights)  # empties the dict
    builder.tokenizer.save_pretrained(staging)
    (staging / "sdzero.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for file in staging.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


def weights_sha256(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of every weight, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights, key=lambda item: item[0]):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """`weights_sha256` of an exported model folder."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    return weights_sha256(item for file in files for item in load_file(file).items())
