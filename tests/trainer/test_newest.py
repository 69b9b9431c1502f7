"""`sdzero fit --ckpt_path=newest`: one command that starts a training and resumes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy

from sdzero.cli.lightning import SDZeroCLI
from sdzero.trainer.checkpoint_io import AtomicCheckpointIO
from sdzero.trainer.strategies import FullShard
from support.runs import ROOT


def fit(root: Path, max_steps: int) -> None:
    every_step = {"monitor": "step", "mode": "max", "save_top_k": 2, "every_n_train_steps": 1, "filename": "{step}"}
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": every_step}]
    overlay = root.with_suffix(".yaml")
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "enable_model_summary": False}}))
    SDZeroCLI.main(
        [
            "fit",
            f"--config={ROOT}/configs/recipes/smoke/base.yaml",
            f"--config={overlay}",
            f"--model.student.path={ROOT}/configs/tiny_model",
            "--data.source.num_documents=12",
            "--data.traces_per_step=4",
            f"--trainer.default_root_dir={root}",
            f"--trainer.max_steps={max_steps}",
            "--trainer.max_epochs=2",
            "--trainer.enable_progress_bar=false",
            "--ckpt_path=newest",
        ]
    )


def test_the_same_command_starts_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    fit(root, 2)
    assert f"no finished checkpoint in {root}/checkpoints: starting from scratch" in capsys.readouterr().out
    newest = root / "checkpoints/step=2.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    fit(root, 3)
    assert f"resuming from {root}/checkpoints/step=1.ckpt" in capsys.readouterr().out
    assert (root / "checkpoints/step=3.ckpt").is_file()


def newest(folder: Path, subcommand: str = "fit", rank: int = 0, strategy: Any = None) -> Path | None:
    trainer = SimpleNamespace(strategy=strategy or SingleDeviceStrategy(), is_global_zero=rank == 0)
    return SDZeroCLI._newest(cast(Any, SimpleNamespace(trainer=trainer)), folder, subcommand)


def test_an_evaluation_needs_a_finished_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    with pytest.raises(ValueError, match="no finished checkpoint"):  # the weights would be the initial ones
        newest(tmp_path, "validate")


def test_one_rank_reads_whole_models_where_the_strategy_broadcasts_the_path(tmp_path: Path) -> None:
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"global_step": step}, tmp_path / f"step={step}.ckpt")
    assert newest(tmp_path) == newest(tmp_path, "validate") == tmp_path / "step=2.ckpt"
    (tmp_path / "step=2.ckpt").write_bytes(b"")
    assert newest(tmp_path, rank=0, strategy=FullShard()) == tmp_path / "step=1.ckpt"
    assert newest(tmp_path, rank=1, strategy=FullShard()) == tmp_path / "step=2.ckpt"  # any: rank 0's is loaded
    assert newest(tmp_path, rank=1) == tmp_path / "step=1.ckpt"
