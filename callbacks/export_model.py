"""Export of the trained student as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from sdzero.methods import Method
from sdzero.models.export import export
from sdzero.types import BUDGET


class ExportModel(L.Callback):
    """Writes the student at the end of training, for vLLM, transformers and the next stage.

    Args:
        folder: folder to write; null: `model` in the Trainer's default_root_dir.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    # not on_train_end, which a run resumed from the checkpoint of its last step skips
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        folder = self.folder or Path(trainer.default_root_dir) / "model"
        manifest = {name: getattr(pl_module, name) for name in ("policy_version", *BUDGET)}
        export(pl_module.student, pl_module.builder, folder, trainer.is_global_zero, manifest)
        trainer.strategy.barrier()
