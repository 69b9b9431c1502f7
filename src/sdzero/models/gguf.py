"""`sdzero import-gguf`: conversion of a GGUF file to a model folder in Hugging Face format."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdzero.utils.files import atomic_folder

PACKAGES = ("gguf", "accelerate")
"""Packages that transformers needs to read a GGUF file."""


def import_gguf(file: Path, folder: Path) -> None:
    """Write weights, config, tokenizer with its chat template, and generation_config, atomically.

    The weights are float32, which holds de-quantised values exactly and which training needs. The tokenizer is the one
    that transformers builds from the file, which says little about how text is split before merges apply.

    Raises:
        ModuleNotFoundError: a package of `PACKAGES` is missing.
        FileNotFoundError: the file does not exist.
        FileExistsError: `folder` exists.
        ValueError: not a GGUF file, or not one of an architecture that transformers reads.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        message = f'to read a GGUF file, transformers needs {" and ".join(missing)}: pip install "sdzero[gguf]"'
        raise ModuleNotFoundError(message, name=missing[0])
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file: it does not begin with the letters GGUF")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: take another FOLDER, or remove it to have it made again")
    model, tokenizer = _load(file)
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _load(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ValueError as error:
        raise ValueError(f"transformers cannot read {file}: {error}") from error
    # a model that was read from a quantised file refuses to be saved as a plain one: a new one takes over its weights
    del read.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue] - set when it was read
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    ids = end_ids(tokenizer)
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0] if ids else None
    return model, tokenizer


def end_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end a turn: the tokenizer's, and the special token its chat template puts after an answer."""
    ids = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        answer = "an answer"
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids.update([i for i in tokenizer.encode(tail, add_special_tokens=False) if i in special][:1])
    return sorted(ids)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="sdzero import-gguf",
        description="Makes a model folder in Hugging Face format, in float32, out of a GGUF file that transformers can "
        "read: quantised weights are de-quantised, tokenizer and chat template come along.",
    )
    parser.add_argument("file", metavar="FILE.gguf", type=Path)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write; it must not exist yet")
    options = parser.parse_args(arguments)
    import_gguf(options.file, options.folder)
    print(f"student.path: {options.folder}")
