"""Random tiny Qwen3 in a folder, with a tokenizer that decodes exactly, for engine and trainer tests."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
WORDS = [
    *["system", "user", "assistant", "Let", "me", "rephrase", "the", "above", "solution", "Wait", "this", "response"],
    *["is", "not", "correct", "let", "start", "over", "wait", "boxed", "answer", "\n\n"],
]
CHARACTERS = list(string.digits + string.ascii_letters + string.punctuation + " \n")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of known words and single characters: printable ASCII survives encode and decode."""
    pieces = sorted({*WORDS, *CHARACTERS}, key=lambda piece: (-len(piece), piece))
    vocab = {piece: index for index, piece in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = Regex("|".join([*(re.escape(piece) for piece in pieces), r"[\s\S]"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def write_tiny_model(path: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Write config, random weights, tokenizer and generation config (two end-of-turn ids) to `path`; return it.

    The torch random state is left as it was. `overrides` are fields of `Qwen3Config`, e.g. `num_hidden_layers=3`.
    """
    tokenizer = tiny_tokenizer()
    end_ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    config: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        num_hidden_layers=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.15,  # logits spread by a few nats: sampling settings matter
        eos_token_id=end_ids[0],
        pad_token_id=end_ids[1],
        bos_token_id=None,
        dtype="float32",
    )
    model = _random(Qwen3Config(**{**config, **overrides}), seed)
    # what engines must not pick up
    defaults = dict(do_sample=True, top_k=5, temperature=0.3, repetition_penalty=1.5, min_p=0.2)
    model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=end_ids[1], **defaults)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def _random(config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def write_tiny(path: str | Path, kind: str, **overrides: Any) -> Path:
    """Write a random tiny model of any transformers architecture, such as `olmo3`, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=8192)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, **overrides}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **shape, **ids, **heads)
    _random(config, 0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)
