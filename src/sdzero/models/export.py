"""Export of a trained model as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from sdzero.models.parallelize import unwrap
from sdzero.models.weights import full_weights, weights_sha256
from sdzero.prompts import PromptBuilder
from sdzero.utils.files import atomic_folder


def export(model: nn.Module, builder: PromptBuilder, folder: Path, is_writer: bool, manifest: dict[str, Any]) -> None:
    """Write, atomically, a Hugging Face folder that vLLM and transformers load. Collective.

    Args:
        model: the student, sharded or not.
        builder: the tokenizer's builder.
        folder: folder to create.
        is_writer: true on the one rank that writes.
        manifest: contents of the folder's sdzero.json, to which the weights' hash is added.
    """
    weights = {name: tensor.cpu().clone() for name, tensor in full_weights(model) if is_writer}
    if not is_writer:
        return
    manifest = {**manifest, "weights_sha256": weights_sha256(weights.items())}
    with atomic_folder(folder) as partial:
        unwrap(model).hf.save_pretrained(partial, state_dict=weights)  # empties the dict
        builder.tokenizer.save_pretrained(partial)
        (partial / "sdzero.json").write_text(json.dumps(manifest, indent=2) + "\n")
