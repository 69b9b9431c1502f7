"""Iterative self-evolution (section 3.4): synchronisation of the teacher with the student."""

from __future__ import annotations

from typing import Any

import lightning as L

from sdzero.methods import SelfDistill


class TeacherSync(L.Callback):
    """Copies the student into the teacher at intervals, or averages it in after every step (EMA).

    Optimizer and schedule are unaffected; the generation number is logged as teacher/generation.

    Args:
        every_n_steps: synchronise after every n optimizer steps.
        every_n_epochs: synchronise after every n passes over the questions.
        plateau_monitor: synchronise when this logged metric (higher is better), e.g. `eval/avg_at_k`, stops rising.
            A run that resumes between a step and its validation skips that validation.
        plateau_patience: validations without a rise before a synchronisation.
        ema_decay: instead of copying, teacher <- decay * teacher + (1 - decay) * student after every step.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        plateau_monitor: str | None = None,
        plateau_patience: int = 3,
        ema_decay: float | None = None,
    ) -> None:
        if sum(x is not None for x in (every_n_steps, every_n_epochs, plateau_monitor, ema_decay)) != 1:
            raise ValueError("TeacherSync: set one of every_n_steps, every_n_epochs, plateau_monitor, ema_decay")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"TeacherSync: ema_decay must lie in [0, 1), got {ema_decay}")
        if any(n is not None and n < 1 for n in (every_n_steps, every_n_epochs, plateau_patience)):
            raise ValueError("TeacherSync: every_n_steps, every_n_epochs and plateau_patience must be at least 1")
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.plateau_monitor = plateau_monitor
        self.plateau_patience = plateau_patience
        self.ema_decay = ema_decay
        self.version = 0
        self.best = float("-inf")
        self.num_without_rise = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, SelfDistill):
            raise TypeError(f"TeacherSync needs a method with a teacher, not {type(pl_module).__name__}")
        if pl_module.shares_base:
            raise ValueError(
                "TeacherSync: the teacher is the student without its adapters, and cannot change. Remove the callback, "
                "or give the teacher its own weights: teacher: {path: ..., lora: ...}, like student's"
            )
        teacher = pl_module.teacher_config
        # then only the adapters differ from the student's, and they are float32
        frozen = teacher.lora is not None and teacher.path == pl_module.student_config.path
        if self.ema_decay is not None and teacher.dtype != "float32" and not frozen:
            raise ValueError(
                "TeacherSync: ema_decay changes weights by less than bfloat16 resolves: set teacher.dtype=float32"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, SelfDistill)
        student, teacher = ([p.shape for p in m.parameters()] for m in (pl_module.student, pl_module.teacher))
        if student != teacher:
            raise ValueError(
                "TeacherSync: teacher and student have different shapes: remove the callback, or use a teacher of the "
                "student's architecture"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SelfDistill)
        if self._due(trainer, pl_module):
            pl_module.update_teacher(1.0 if self.ema_decay is None else 1 - self.ema_decay)
        self.version = pl_module.policy_version
        pl_module.log("teacher/generation", float(pl_module.teacher_generation), rank_zero_only=True)

    def _due(self, trainer: L.Trainer, pl_module: SelfDistill) -> bool:
        stepped = pl_module.policy_version > self.version
        if self.ema_decay is not None:
            return stepped
        if self.every_n_steps is not None:
            return stepped and pl_module.policy_version % self.every_n_steps == 0
        # the last batch, not on_train_epoch_end: a checkpoint of that batch then holds the new teacher
        if self.every_n_epochs is not None:
            return trainer.is_last_batch and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.plateau_monitor is None or trainer.sanity_checking or not isinstance(pl_module, SelfDistill):
            return
        if self.plateau_monitor not in trainer.callback_metrics:
            known = sorted(trainer.callback_metrics)
            raise ValueError(
                f"TeacherSync: plateau_monitor {self.plateau_monitor!r} is not logged: choose one of {known}"
            )
        value = float(trainer.callback_metrics[self.plateau_monitor])
        self.num_without_rise = 0 if value > self.best else self.num_without_rise + 1
        self.best = max(self.best, value)
        if self.num_without_rise >= self.plateau_patience:
            pl_module.update_teacher()
            self.num_without_rise = 0

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "best": self.best, "num_without_rise": self.num_without_rise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
