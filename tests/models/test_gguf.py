"""A model folder out of a GGUF file: the same model, the same tokenizer, every end of a turn; or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sdzero.models.gguf
from sdzero.models.gguf import end_ids, import_gguf
from sdzero.prompts import PromptBuilder
from support.helpers import plain_logprobs
from support.runs import refusal
from support.runs import sdzero as command

HIDDEN, HEADS, MLP = 64, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A llama of one layer, its matrices quantised to Q8_0; returns the values that the file holds."""
    tokens = [*SPECIAL, *LETTERS, "an"]
    rng, writer = np.random.default_rng(0), GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)  # not what the template ends a turn with
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    matrices = {
        "token_embd": (len(tokens), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // HEADS, HIDDEN),
        "blk.0.attn_v": (HIDDEN // HEADS, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (MLP, HIDDEN),
        "blk.0.ffn_up": (MLP, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, MLP),
    }
    held = {}
    for name, shape in matrices.items():
        packed = gguf.quants.quantize(rng.normal(0, 0.3, shape).astype(np.float32), GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
        held[name] = gguf.quants.dequantize(packed, GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        held[name] = rng.normal(1, 0.3, HIDDEN).astype(np.float32)
        writer.add_tensor(f"{name}.weight", held[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A GGUF file, the folder that the command made of it, and the values in the file."""
    root = tmp_path_factory.mktemp("gguf")
    held = write_gguf(root / "tiny.gguf")
    import_gguf(root / "tiny.gguf", root / "models/tiny")
    return root / "tiny.gguf", root / "models/tiny", held


def test_weights_are_the_files_values_exactly(tiny) -> None:
    _, folder, held = tiny
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    names = {
        "token_embd": "model.embed_tokens",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
        "output_norm": "model.norm",
    }
    for theirs, ours in names.items():
        assert np.array_equal(weights[f"{ours}.weight"].numpy(), held[theirs]), ours
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_logprobs_and_tokens_are_those_of_transformers_own_reading(tiny) -> None:
    file, folder, _ = tiny
    turns, ids, logprobs = [{"role": "user", "content": "an apple and 12 pears"}], [], []
    for source, options in ((file.parent, {"gguf_file": file.name}), (folder, {})):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        ids.append(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        logprobs.append(plain_logprobs(model, ids[-1][:5], ids[-1][5:]))
    assert ids[0] == ids[1] and len(ids[0]) > 20
    assert torch.equal(*logprobs)


def test_a_turn_ends_with_the_files_end_and_with_the_templates(tiny) -> None:
    _, folder, _ = tiny
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    builder = PromptBuilder.from_pretrained(folder)
    assert builder.end_ids == {0, 2} and builder.tokenizer.chat_template == TEMPLATE
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    plain.chat_template = None
    assert end_ids(plain) == [0]


def test_nothing_stays_of_an_import_that_failed(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _, _ = tiny
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", Mock(side_effect=OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            import_gguf(file, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    import_gguf(file, tmp_path / "model")  # over what the failed one has left beside it
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_refusals_name_the_remedy(tiny, tmp_path: Path, capsys, monkeypatch) -> None:
    file, folder, _ = tiny
    other = tmp_path / "other.gguf"
    other.write_bytes(b"not a model")
    strange = tmp_path / "strange.gguf"
    writer = GGUFWriter(strange, "cat")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    def said(*arguments: Path) -> str:
        return refusal(capsys, monkeypatch, "import-gguf", *arguments)

    assert "no file /nowhere/x.gguf" in said(Path("/nowhere/x.gguf"), tmp_path / "new")
    assert f"{other} is not a GGUF file" in said(other, tmp_path / "new")
    assert "architecture cat" in said(strange, tmp_path / "new")
    assert f"{folder} is there already: take another FOLDER" in said(file, folder)
    monkeypatch.setattr(sdzero.models.gguf, "find_spec", lambda name: None if name == "gguf" else name)
    assert 'needs gguf: pip install "sdzero[gguf]"' in said(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_commands_help_is_light() -> None:
    done = command("import-gguf", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "FILE.gguf FOLDER" in done.stdout
    assert "sdzero.utils.files" in done.stderr and not any(line.endswith(" torch") for line in done.stderr.splitlines())
