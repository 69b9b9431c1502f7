"""Training loops that take turns: Lightning's, transformers', or plain ones.

A side pauses after each optimizer step until it is called again, so that steps of different trainers alternate and
start-up and shut-down are not measured. Each side counts the tokens of its loss; the benchmark stops if their number
differs from the stored one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Semaphore
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from sdzero.data.base import stream_loader
from sdzero.methods.base import Method

FOREVER = 10**6
OPTIMIZER = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 1e-4}
MAX_GRAD_NORM = 1.0


class Side:
    """One optimizer step of a training loop at each call.

    Args:
        loop: trains until `after_step`, called after each optimizer step, returns True. It runs in its own thread and
            adds to `tokens` and `loss`.
        expected: tokens in the loss of every step.
    """

    def __init__(self, loop: Callable[[Side], None], expected: int) -> None:
        self.loop, self.expected = loop, expected
        self.tokens: float | Tensor = 0
        self.loss: float | Tensor = 0.0
        self.first_loss: float | None = None
        self._num_threads = torch.get_num_threads()
        self._go, self._done, self._ending = Semaphore(0), Semaphore(0), False
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __call__(self) -> None:
        self.tokens, self.loss = 0, 0.0
        if self._running is None:
            self._running = self._start()
        else:
            self._go.release()
        self._done.acquire()
        if self._running.done():
            self._running.result()
            raise RuntimeError("the training loop ended early")
        if int(self.tokens) != self.expected:
            raise RuntimeError(f"trained on {int(self.tokens)} tokens where {self.expected} are stored")
        if self.first_loss is None:
            self.first_loss = float(self.loss)

    def _start(self) -> Future[None]:
        running = self._pool.submit(self._run)
        running.add_done_callback(lambda _: self._done.release())  # an error in the loop must not block us
        return running

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # a new thread starts with the default
        self.loop(self)

    def after_step(self) -> bool:
        """Wait for the next call; return True to end the loop."""
        self._done.release()
        self._go.acquire()
        return self._ending

    def close(self) -> None:
        self._ending = True
        self._go.release()
        self._pool.shutdown()


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else nullcontext()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **OPTIMIZER)


class _Turns(L.Callback):
    def __init__(self, side: Side) -> None:
        self.side, self.num_seen = side, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.side.tokens = pl_module.num_tokens_trained - self.num_seen
        self.num_seen = pl_module.num_tokens_trained
        self.side.loss = trainer.callback_metrics["train/loss"]
        trainer.should_stop = self.side.after_step()


def ours(make: Callable[[], Method], batch: Callable[[Method, int], Any], expected: int) -> Side:
    """Run a method in Lightning's Trainer. `batch` makes a step's batch, which adds `expected` tokens."""

    def loop(side: Side) -> None:
        method = make()
        on_gpu = torch.cuda.is_available()
        trainer = L.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=1,
            precision="bf16-mixed" if on_gpu else "32-true",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[_Turns(side)],
        )

        def batches() -> Iterator[Any]:
            for step in range(FOREVER):
                yield batch(method, step)

        trainer.fit(method, train_dataloaders=stream_loader(FOREVER, batches))

    return Side(loop, expected)


def plain(folder: Path, step: Callable[[list[nn.Module], Side], None], expected: int, num_models: int = 1) -> Side:
    """Run a loop in bare torch over one model, or a student and its frozen teacher.

    `step(models, side)` accumulates the gradients of a step, one sequence at a time.
    """

    def loop(side: Side) -> None:
        loaded: list[Any] = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(num_models)]
        student, *_ = [model.to(device()) for model in loaded]
        optimizer = adamw(student.parameters())
        while True:
            step(loaded, side)
            nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if side.after_step():
                return

    return Side(loop, expected)


def predictions(model: nn.Module, context: Sequence[int], target: Sequence[int]) -> Tensor:
    """Logits of every token of `target` after `context`, [N, V] in float32."""
    ids = torch.tensor([[*context, *target]], device=device())
    with autocast():
        logits = model(input_ids=ids, logits_to_keep=len(target) + 1, use_cache=False).logits
    return logits[0, :-1].float()


class _TrlTurns(TrainerCallback):
    def __init__(self, side: Side) -> None:
        self.side = side

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.side.after_step()


def trl(make: Callable[[Side], Any], expected: int) -> Side:
    """Run a trainer of TRL from `make`, whose `compute_loss` adds to the side's `tokens` and `loss`."""

    def loop(side: Side) -> None:
        trainer = make(side)
        trainer.add_callback(_TrlTurns(side))
        trainer.train()

    return Side(loop, expected)


def trl_options(folder: Path, rows: int, num_rows: int) -> dict[str, Any]:
    """Arguments of every TRL trainer: `num_rows` sequences a step, `rows` at a time, and the optimizer of the others.

    TRL uses torch's fused optimizer. Its default of recomputing activations is turned off, as on all sides.
    """
    assert num_rows % rows == 0, (num_rows, rows)
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": num_rows // rows,
        "max_steps": FOREVER,
        "learning_rate": OPTIMIZER["lr"],
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": OPTIMIZER["weight_decay"],
        "max_grad_norm": MAX_GRAD_NORM,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": False,
        "shuffle_dataset": False,
    }
