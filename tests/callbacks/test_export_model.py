"""The exported folder is a model of its own, whole or not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sdzero.callbacks import ExportModel
from sdzero.methods import SRT
from sdzero.models.language_model import ModelConfig
from sdzero.models.weights import folder_sha256
from sdzero.prompts import PromptBuilder
from sdzero.types import TraceBatch
from support.helpers import fit, make_trace
from support.tiny_model import write_tiny_model


def train(path: Path, root: Path, *callbacks: L.Callback, num_steps: int = 2) -> SRT:
    method = SRT(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    traces = [make_trace(method.builder, "q", "1+1=3", "1+1=2", reward=0)]
    fit(method, [TraceBatch(traces, i) for i in range(num_steps)], root, *callbacks)
    return method


def independent_sha256(folder: Path) -> str:
    """From the raw bytes of the safetensors files, tensor by tensor."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + str(tensors[name].dtype).encode() + b"\0")
        digest.update(str(tensors[name].shape).encode() + b"\0" + tensors[name].tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_the_trained_model(tmp_path: Path, tied: bool) -> None:
    path = write_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    method = train(path, tmp_path, ExportModel())
    folder = tmp_path / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    ids = torch.tensor([method.builder.chat("what is 1+1?")])
    with torch.no_grad():
        logits, of_base = loaded(ids).logits, AutoModelForCausalLM.from_pretrained(path)(ids).logits
        assert torch.equal(logits, method.student.hf(ids).logits)  # pyright: ignore[reportCallIssue]
    assert not torch.allclose(logits, of_base, atol=1e-3)

    original, exported = PromptBuilder.from_pretrained(path), PromptBuilder.from_pretrained(folder)
    assert exported.chat("1+1=") == original.chat("1+1=")
    assert exported.end_ids == original.end_ids and len(exported.end_ids) == 2
    assert exported.pad_id == original.pad_id


def test_the_manifest_names_the_weights_and_the_budget(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "student"
    method = train(path, tmp_path, ExportModel(folder))
    manifest = json.loads((folder / "sdzero.json").read_text())
    assert manifest["weights_sha256"] == folder_sha256(folder) == independent_sha256(folder)
    assert manifest["weights_sha256"] != folder_sha256(path)
    assert manifest["policy_version"] == 2
    assert manifest["num_tokens_trained"] == method.num_tokens_trained > 0
    assert manifest["num_generations"] == manifest["num_tokens_sampled"] == 0


class PowerCut(BaseException):
    pass


def test_a_crash_in_the_middle_leaves_what_was_there(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing where nothing was, the older model where one was; and the next export succeeds."""

    def crash(*args: object, **kwargs: object) -> None:
        raise PowerCut

    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", crash)  # the weights are written already
        with pytest.raises(PowerCut):
            train(path, tmp_path, ExportModel())
    assert not folder.exists()

    train(path, tmp_path, ExportModel(), num_steps=1)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", crash)
        with pytest.raises(PowerCut):
            train(path, tmp_path, ExportModel())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    train(path, tmp_path, ExportModel())
    assert json.loads((folder / "sdzero.json").read_text())["policy_version"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
