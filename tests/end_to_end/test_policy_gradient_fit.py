"""`sdzero fit` with PolicyGradient: groups of tempered samples, the engine in step with the student, and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from sdzero.utils.recipe import load_recipe
from support.runs import SMOKE, exit_code, responses, scalars

NUM_STEPS, NUM_QUESTIONS, GROUP = 4, 6, 4


def config(smoke_run: Path, out: Path) -> dict[str, Any]:
    """Return the second phase of the smoke recipe, with another method and no validation."""
    recipe = load_recipe(SMOKE)
    entry = next(entry for entry in recipe.entries if entry.name == "self_distill")
    config, _ = recipe.compose(entry)
    optimizer = config["model"]["init_args"]["optimizer"]
    config["model"] = {
        "class_path": "sdzero.methods.PolicyGradient",
        "init_args": {
            "student": {"path": str(smoke_run / "srt/model")},
            "optimizer": optimizer,
            "policy_loss": {"kl_coef": 0.001, "entropy_coef": 0.001},
        },
    }
    config["data"]["init_args"] |= {
        "num_questions": NUM_QUESTIONS * NUM_STEPS,
        "prompts_per_step": NUM_QUESTIONS,
        "rollouts_per_prompt": GROUP,
        "sampling": {"temperature": 0.7, "max_new_tokens": 40},
        "call_size": 12,
        "evaluation": {"num_questions": 0},
    }
    saved = "lightning.pytorch.callbacks.ModelCheckpoint"
    config["trainer"] |= {
        "default_root_dir": str(out),
        "limit_val_batches": 0,
        "callbacks": [
            {"class_path": "sdzero.callbacks.ExportModel"},
            {"class_path": saved, "init_args": {"monitor": "step", "mode": "max", "every_n_train_steps": 1}},
        ],
    }
    return config


def fit(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], file: Path, *more: str) -> None:
    file.write_text(yaml.safe_dump(config))
    assert exit_code(monkeypatch, "fit", "--config", file, *more) == 0


def test_a_fit_and_its_resume(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "resumed"
    fit(monkeypatch, config(smoke_run, whole), tmp_path / "whole.yaml", f"--trainer.max_steps={NUM_STEPS}")
    (gaps,) = scalars(whole, "rollout/logprob_gap")
    assert len(gaps) == NUM_STEPS and all(gap < 1e-3 for _, gap in gaps), "the engine's weights are the student's"
    (kl,) = scalars(whole, "train/kl_reference")
    assert kl[0][1] == pytest.approx(0, abs=1e-9) and all(value > 0 for _, value in kl[1:])
    flat = [scalars(whole, f"rollout/{name}")[0] for name in ("all_wrong", "all_right")]
    assert any(wrong + right < 1 for (_, wrong), (_, right) in zip(*flat, strict=True)), "some group has variance"
    (first, *_) = [responses(whole / "journal/rank0", f"train-{step:06d}") for step in (NUM_STEPS - 1,)]
    asked = [response["question"] for response in first]
    assert len(first) == NUM_QUESTIONS * GROUP and all(asked.count(id) == GROUP for id in asked)
    before, after = (load_file(path / "model/model.safetensors") for path in (smoke_run / "srt", whole))
    assert all(not after[name].equal(tensor) for name, tensor in before.items())

    fit(monkeypatch, config(smoke_run, out), tmp_path / "resumed.yaml", "--trainer.max_steps=2")
    options = (f"--trainer.max_steps={NUM_STEPS}", "--ckpt_path=newest")
    fit(monkeypatch, config(smoke_run, out), tmp_path / "resumed.yaml", *options)
    resumed = load_file(out / "model/model.safetensors")
    assert all(resumed[name].equal(tensor) for name, tensor in after.items()), "bitwise"
