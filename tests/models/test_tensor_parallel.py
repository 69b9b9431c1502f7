"""A model cut over two gloo ranks is the model: the same log-probabilities and gradients, from the same weights, and
the same run after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.runs import run_script
from support.tiny_model import write_tiny

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "olmo3": {},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    models = [write_tiny(folder / kind, kind, num_key_value_heads=2, **more) for kind, more in KINDS.items()]
    run_script("tensor_parallel_ranks.py", folder, *models)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_compute_what_one_computes(kind: str, rank: int, compared: Path) -> None:
    found = torch.load(compared / f"rank{rank}.pt")[kind]
    assert found["logprobs"] < 1e-5 and found["ranks_agree"]
    assert found["gradients"] < 1e-5 and found["head_norms"] < 1e-5
    assert found["copies"], "what both hold whole stays the same on both"
    assert found["weights"], "gathered and averaged, every weight is what was loaded"
    assert found["smallest_part"] == 0.5, "no rank holds more than half of a matrix, and none less"


def test_a_run_is_gone_on_with_by_ranks_that_cut_the_model_and_by_ranks_that_do_not(compared: Path) -> None:
    """Six steps with two copies into the teacher, or the last three of them."""
    whole, cut, uncut = (torch.load(compared / name / "metrics-rank0.pt") for name in ("whole", "cut", "uncut"))
    assert whole["state"] == cut["state"] == uncut["state"] and whole["state"]["policy_version"] == 6
    assert all(torch.equal(weight, cut["weights"][name]) for name, weight in whole["weights"].items())
    for name, weight in whole["weights"].items():
        assert float((weight - uncut["weights"][name]).norm() / weight.norm()) < 1e-5, name
