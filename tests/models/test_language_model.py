"""Loading and hashing of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sdzero.models.language_model import LanguageModel, ModelConfig, load
from sdzero.models.weights import folder_sha256, weights_sha256
from support.helpers import same, weights_of

# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../model", "runs/srt/model", "model", "runs/srt"])
def test_a_missing_folder_is_named_with_its_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/srt").mkdir(parents=True)  # a folder, but of no model
    with pytest.raises(FileNotFoundError, match=r"student\.path: .*config\.json.*sdzero run"):
        ModelConfig(name).check_path()


def test_model_folders_and_hub_ids_pass(path: Path) -> None:
    ModelConfig(str(path)).check_path()
    ModelConfig("Qwen/Qwen3-4B").check_path()


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pretrained_weights_are_the_folders(path: Path, dtype: Any) -> None:
    model = load(ModelConfig(str(path), dtype=dtype), seed=0)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    assert same(weights_of(model.hf), weights_of(expected))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert all(module.training for module in model.modules())  # from_pretrained returns eval mode


def test_the_head_sees_what_makes_the_logits(path: Path) -> None:
    model = load(ModelConfig(str(path)), seed=0)
    input_ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    predicts = torch.tensor([[False, True, True, False], [True, False, False, False]])
    logits = model(input_ids, predicts, lambda hidden, weight: hidden @ weight.T)
    expected = model.hf(input_ids=input_ids).logits[predicts]
    torch.testing.assert_close(logits, expected)


def test_a_model_that_changes_its_logits_is_refused(path: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(path)
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        setattr(hf.config, key, 30.0)
        with pytest.raises(ValueError, match=f"changes its logits after the head.*{key}"):
            LanguageModel(hf)
        setattr(hf.config, key, None)
    hf.lm_head.bias = nn.Parameter(torch.zeros(len(hf.lm_head.weight)))
    with pytest.raises(ValueError, match="changes its logits after the head.*bias"):
        LanguageModel(hf)


def random_weights(path: Path, seed: int) -> dict[str, Tensor]:
    return weights_of(load(ModelConfig(str(path), weights="random"), seed))


def test_random_weights_depend_on_the_runs_seed_alone(path: Path) -> None:
    torch.manual_seed(1)
    first, state = random_weights(path, 0), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws change
    torch.manual_seed(2)
    assert same(random_weights(path, 0), first)
    other = random_weights(path, 1)
    assert not any(torch.equal(other[name], first[name]) for name in first if first[name].dim() > 1)


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_loading_ignores_the_default_device(path: Path, weights: Any) -> None:
    """Lightning calls configure_model with the accelerator as default device; `meta` stands for any other one."""
    config = ModelConfig(str(path), weights=weights)
    with torch.device("meta"):
        model = load(config, seed=0)
    assert same(weights_of(model), weights_of(load(config, seed=0)))


# --- hashes ---------------------------------------------------------------------------------------


def test_the_hash_sees_names_dtypes_shapes_and_values_but_no_order() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3)}
    reference = weights_sha256(weights.items())
    assert weights_sha256(reversed(weights.items())) == reference
    transposed = weights["a"].T.contiguous().T  # the same values, laid out otherwise
    assert weights_sha256({**weights, "a": transposed}.items()) == reference
    others: list[dict[str, Tensor]] = [
        {"a": weights["a"], "c": weights["b"]},
        {**weights, "a": weights["a"].reshape(3, 2)},
        {**weights, "b": torch.zeros(3, dtype=torch.int32)},
        {**weights, "b": torch.tensor([0.0, 0.0, 1e-45])},
        {"a": weights["a"]},
    ]
    hashes = {weights_sha256(other.items()) for other in others}
    assert len(hashes) == len(others) and reference not in hashes


def test_a_folder_of_several_files_has_the_hash_of_its_weights(path: Path, tmp_path: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert folder_sha256(tmp_path) == weights_sha256(hf.named_parameters())
    assert folder_sha256(tmp_path) != folder_sha256(path)


def test_a_folder_without_weights_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="safetensors"):
        folder_sha256(tmp_path)
