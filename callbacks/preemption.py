"""Checkpoint and exit at the next step boundary after SIGTERM, or SLURM's SIGUSR1 before a time limit."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from sdzero.utils.process import Stopped, exit_now, exit_status, requeue, signal_name, write_stderr

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECOND_SECONDS = 1.0
"""Signals within this time count as one: a process group's signal arrives twice if a parent forwards it too."""


class Preemption(L.Callback):
    """Ends a fit at the next step boundary after SIGTERM or SIGUSR1, with a checkpoint to resume from.

    A boundary is the end of a step, or of a generate call of a validation, which is then repeated. All ranks agree
    there, since a signal may reach only one of them. The process exits with status 128 + signal. After the last step
    the checkpoint is saved and the run continues to its end. A second signal ends the process at once.

    It replaces Lightning's own handlers, which communicate with other ranks, and save under SLURM, in the middle of a
    step. `sdzero fit` always adds it; in your own Trainer, list it last among the callbacks.
    """

    def __init__(self) -> None:
        self._signum = 0  # the first one received
        self._received_at = 0.0
        self._before: dict[int, Any] = {}  # handlers installed before
        self._is_active = False
        self._has_ended = False
        self._prints = True
        self._saved: Path | None = None

    # --- signal handlers ----------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._signum, self._saved, self._has_ended = 0, None, False
        self._before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._prints = trainer.is_global_zero

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_active = True
        self._install(dict.fromkeys(SIGNALS, self._handle))  # Lightning restores these after training

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install(self._before)

    on_predict_start = on_test_start

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._is_active = False
        self._install(self._before)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    @staticmethod
    def _install(handlers: dict[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, _: Any) -> None:
        if not self._is_active:  # Lightning has restored this handler after an exception
            self._install(self._before)
            signal.raise_signal(signum)
        elif not self._signum:
            self._signum, self._received_at = signum, time.monotonic()
            when = "is over and writes its last files" if self._has_ended else "ends at the next step boundary"
            if self._prints:
                write_stderr(f"{signal_name(signum)}: the training {when}; a second signal ends it at once")
        elif time.monotonic() - self._received_at >= SECOND_SECONDS:
            exit_now(exit_status(signum))

    # --- step boundaries ----------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install(dict.fromkeys(SIGNALS, self._handle))
        if signum := self._received_signal(trainer):
            self._stop(trainer, signum)  # nothing new to save

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        signum = self._received_signal(trainer)
        if not signum or _validates_next(trainer):  # whose start is the boundary then
            return
        if not _is_at_end(trainer):
            # Lightning logs a step after this hook
            trainer._logger_connector.update_train_step_metrics()
        self._end(trainer, signum)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._install(self._before)
        self.on_validation_batch_end(trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        is_fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if is_fitting and (signum := self._received_signal(trainer)):
            self._end(trainer, signum)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._has_ended = True

    def _received_signal(self, trainer: L.Trainer) -> int:
        """Return the signal that any rank received; 0 for none. Collective."""
        tensor = torch.tensor(self._signum, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(tensor, reduce_op="max"))  # pyright: ignore[reportArgumentType] - a string

    def _end(self, trainer: L.Trainer, signum: int) -> None:
        at_end = _is_at_end(trainer)
        if trainer.validating and not at_end:
            _rewind_validation(trainer)
        if self._saved is None:
            self._save(trainer)
        if not at_end:
            self._stop(trainer, signum)

    def _save(self, trainer: L.Trainer) -> None:
        first = trainer.checkpoint_callback
        own = first.dirpath if isinstance(first, ModelCheckpoint) else None
        folder = Path(own or Path(trainer.default_root_dir) / "checkpoints")
        older = [*folder.glob("preempted-*.ckpt")]
        self._saved = folder / f"preempted-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(self._saved)
        for path in older:
            if path != self._saved:
                trainer.strategy.remove_checkpoint(path)
        if self._prints:
            write_stderr(f"saved {self._saved}")

    def _stop(self, trainer: L.Trainer, signum: int) -> None:
        if self._prints:
            write_stderr(f"ended by {signal_name(signum)}: resume with --ckpt_path=newest or the same `sdzero run`")
            requeue(signum)
        trainer.strategy.barrier()  # a launcher may kill rank 0 once another rank has exited
        # Lightning's launcher kills rank 0 if another rank exits with an error status
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_follower = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        raise Stopped(0 if is_follower else exit_status(signum))


def _validates_next(trainer: L.Trainer) -> bool:
    """Return whether a validation follows this step."""
    loop = trainer.fit_loop.epoch_loop
    assert trainer.fit_loop._data_fetcher is not None
    return loop._should_check_val_fx(trainer.fit_loop._data_fetcher) and not loop.val_loop.skip


def _is_at_end(trainer: L.Trainer) -> bool:
    """Return whether this is the last step."""
    is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 == trainer.max_epochs
    is_last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return is_last_step or trainer.should_stop or (trainer.is_last_batch and is_last_epoch)


def _rewind_validation(trainer: L.Trainer) -> None:
    """Reset Lightning's counts to the first batch of the validation, with which a resumed run then starts.

    Its finished calls are read from the journal.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.increment_ready()
    progress.increment_started()
    progress.current.reset()
