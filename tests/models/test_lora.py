"""Adapters: where they lie, how they start, and what their merged weights are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sdzero.models.export import export
from sdzero.models.language_model import LanguageModel, ModelConfig, load
from sdzero.models.lora import AdaptersOff, Lora, adapters, num_adapter_parameters, target_layers
from sdzero.models.parallelize import check_adapters
from sdzero.models.weights import folder_sha256, full_weights
from sdzero.prompts import PromptBuilder
from support.helpers import same, weights_of
from support.runs import exit_code
from support.tiny_model import write_tiny, write_tiny_model

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
ALL = torch.ones_like(IDS, dtype=torch.bool)


def trained(config: ModelConfig) -> LanguageModel:
    """As if after training: no B is zero any more."""
    model = load(config, seed=0)
    torch.manual_seed(1)
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.up)
    return model


def with_lora(path: Path, **options: Any) -> ModelConfig:
    return ModelConfig(str(path), lora=Lora(rank=3, alpha=7.0), **options)


def plain(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.T


@pytest.mark.parametrize("kind", ["qwen3", "olmo3", "llama", "qwen2"])
def test_every_linear_layer_of_a_decoder_gets_an_adapter_and_nothing_else(kind: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path, kind, tie_word_embeddings=False)
    model = load(with_lora(path), seed=0)
    assert {name.rpartition(".")[2] for name in adapters(model)} == PROJECTIONS
    assert len(adapters(model)) == 2 * len(PROJECTIONS)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trains) == 4 * len(PROJECTIONS) and all(".lora_" in name for name in trains)
    base = AutoModelForCausalLM.from_pretrained(path)
    assert sum(p.numel() for p in trains.values()) == num_adapter_parameters(base, Lora(rank=3))
    assert same(dict(full_weights(model)), weights_of(base))  # names too; B is zero yet


def test_targets_are_names_of_linear_layers(path: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(path)
    lora = Lora(target_modules=["q_proj", "down_proj"])
    chosen = [f"model.layers.{i}.{end}" for i in (0, 1) for end in ("self_attn.q_proj", "mlp.down_proj")]
    assert [*target_layers(hf, lora)] == chosen == [*adapters(load(ModelConfig(str(path), lora=lora), 0).hf)]
    message = r"student\.lora\.target_modules: .*; the decoder has down_proj, gate_proj"
    for bad in (["q_proj", "lm_head"], ["embed_tokens"], ["proj"], []):
        with pytest.raises(ValueError, match=message):
            target_layers(hf, Lora(target_modules=bad))


def test_an_adapter_of_nothing_is_refused() -> None:
    for rank, alpha in ((0, 1.0), (1, 0.0)):
        with pytest.raises(ValueError, match="rank and alpha must be above 0"):
            Lora(rank, alpha)


def test_without_peft_the_extra_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdzero.models.lora.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sdzero\[lora\]"'):
        load(with_lora(path), seed=0)
    load(ModelConfig(str(path)), seed=0)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_adapters_depend_on_the_runs_seed_alone(path: Path, weights: Any) -> None:
    def drawn(seed: int, config: ModelConfig) -> dict[str, Tensor]:
        return {name: adapter.down for name, adapter in adapters(load(config, seed)).items()}

    config = with_lora(path, weights=weights)
    first, state = drawn(0, config), torch.get_rng_state()
    torch.manual_seed(2)
    with torch.device("meta"):  # as Lightning does, with the accelerator
        assert same(drawn(0, config), first)
    assert same(drawn(0, replace(config, weights="pretrained")), first)
    assert not any(torch.equal(tensor, first[name]) for name, tensor in drawn(1, config).items())
    torch.set_rng_state(state)
    drawn(0, config)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws change


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_those_that_peft_merges(tmp_path: Path, tied: bool) -> None:
    path = write_tiny_model(tmp_path, tie_word_embeddings=tied)
    model = trained(with_lora(path))
    config = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    ours = {name.removeprefix("hf."): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(ours[name.removeprefix("base_model.model.")])
    merged = theirs.merge_and_unload()
    weights = dict(full_weights(model))
    assert same(weights, weights_of(merged))
    assert not same(weights, weights_of(AutoModelForCausalLM.from_pretrained(path)))


def test_a_change_below_bfloat16_reaches_the_merged_weights(path: Path) -> None:
    """The base stays as it is, in its own dtype."""
    model = load(with_lora(path, dtype="bfloat16"), seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for adapter in adapters(model).values():
        nn.init.constant_(adapter.up, 1e-6)
    base = weights_of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16))
    for name, tensor in full_weights(model):
        adapted = name.split(".")[-2] in PROJECTIONS
        assert tensor.dtype == (torch.float32 if adapted else torch.bfloat16)
        assert torch.equal(tensor, base[name].float()) == (not adapted)
        assert (tensor.bfloat16() == base[name]).float().mean() > 0.99  # it would have been lost there


def test_an_exported_folder_is_the_model_with_its_adapters(path: Path, tmp_path: Path) -> None:
    model = trained(with_lora(path))
    export(model, PromptBuilder.from_pretrained(path), tmp_path / "out", True, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).logits, model.hf(IDS).logits)
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(path / "model.safetensors").keys()
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if "adapter" in p.name) == []
    assert folder_sha256(tmp_path / "out") != folder_sha256(path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_switched_off_it_is_the_base_to_the_bit_and_back_again(path: Path, checkpointing: bool) -> None:
    model = trained(with_lora(path, gradient_checkpointing=checkpointing))
    base = load(ModelConfig(str(path)), seed=0).eval()
    seen: list[bool] = []
    model.hf.model.layers[0].mlp.register_forward_hook(lambda module, *_: seen.append(module.training))
    expected = model(IDS, ALL, plain)
    with torch.enable_grad():
        off = AdaptersOff(model)(IDS, ALL, plain)
    assert torch.equal(off, base(IDS, ALL, plain)) and not off.requires_grad
    assert seen == [True, False] and model.training
    again = model(IDS, ALL, plain)
    assert torch.equal(again, expected) and not torch.allclose(again, off)
    again.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ZeroDivisionError):
        AdaptersOff(model)(IDS, ALL, lambda hidden, weight: 1 / 0)
    assert torch.equal(model(IDS, ALL, plain), expected)


def test_strategies_that_cannot_hold_them_are_refused() -> None:
    lora = Lora()
    parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="set tensor_parallel_size to 1"):
        check_adapters(lora, "float32", parallel)
    with pytest.raises(ValueError, match=r"FSDPStrategy.*student\.dtype=float32"):
        check_adapters(lora, "bfloat16", FSDPStrategy())
    check_adapters(lora, "float32", FSDPStrategy())
    check_adapters(lora, "bfloat16", ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    check_adapters(None, "float32", parallel)


# --- the command ----------------------------------------------------------------------------------

WITHOUT_SYNC = (
    "[{class_path: sdzero.callbacks.ExportModel}, {class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
    "init_args: {monitor: step, mode: max, every_n_train_steps: 1}}]"
)


def fitted(monkeypatch: pytest.MonkeyPatch, stage: str, base: Path, out: Path, *options: str) -> LanguageModel:
    """Two steps of the smoke recipe's stage with the overlay; the model of its checkpoint, adapters and all."""
    configs = [f"configs/recipes/smoke/{stage}.yaml", f"configs/ablations/lora/{stage}.yaml"]
    arguments = [part for config in configs for part in ("--config", config)]
    arguments += [f"--model.student.path={base}", f"--trainer.default_root_dir={out}", "--trainer.max_steps=2"]
    assert exit_code(monkeypatch, "fit", *arguments, *options) == 0
    (checkpoint,) = out.rglob("*step=2.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    model = load(ModelConfig(str(base), lora=Lora(rank=32, alpha=64.0)), seed=0)
    model.load_state_dict({name.removeprefix("student."): tensor for name, tensor in state.items()})
    return model


def test_a_recipe_with_the_overlay_leaves_merged_weights(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SRT, and self-distillation from what it exported. Plain transformers reads the folders."""
    traces, asked = smoke_run / "collect/traces.jsonl", smoke_run / "collect/questions.json"
    sync = f"--data.disjoint_from={asked}", f"--trainer.callbacks={WITHOUT_SYNC}"
    base = smoke_run / "base/model"
    for stage, options in {"srt": (f"--data.source.path={traces}",), "self_distill": sync}.items():
        model, out = fitted(monkeypatch, stage, base, tmp_path / stage, *options), tmp_path / stage / "model"
        models = (model.hf, *map(AutoModelForCausalLM.from_pretrained, (out, base)))
        ours, exported, before = (hf(IDS).logits for hf in models)
        torch.testing.assert_close(ours, exported)
        assert not torch.allclose(exported, before)
        base = out
