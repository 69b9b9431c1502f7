"""LightningCLI with the project's defaults: one folder per stage, and results that a program can read."""

from __future__ import annotations

import json
import math
import sys
import warnings
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from sdzero.callbacks import Preemption
from sdzero.callbacks.base import rank_file
from sdzero.data.base import StepDataModule
from sdzero.methods import Method, Policy
from sdzero.pipeline.stages import compose_arguments
from sdzero.pipeline.summary import print_evaluation
from sdzero.trainer.checkpoint_io import newest_checkpoint
from sdzero.trainer.collectives import all_gather_objects
from sdzero.trainer.sharded_checkpoint import AtomicFolders
from sdzero.trainer.shares import share_of
from sdzero.utils.files import add_path_to_errors, write_text

NEWEST = "newest"
"""A `--ckpt_path` that lets the same command begin a training and go on with it."""

# Lightning's advice that does not hold here
_NOISE = (
    "Using ModelCheckpoint with manual optimization",  # the state after the step is what a restart needs
    "Total length of `list` across ranks is zero",  # a run without validation
    ".*does not have many workers",  # rollouts are sampled in the trainer's process
    "Your `IterableDataset` has `__len__` defined",  # on purpose: see sdzero.data.base
    "Found .* module.s. in eval mode",  # the teacher
    ".*It is recommended to use `self.log",  # metrics are reduced over the ranks before they are logged
    ".*LeafSpec.* is deprecated",  # Lightning's own use of torch
    "LightningCLI's args parameter is intended",  # SDZeroCLI.check, within `sdzero run`
    r"\s*Unable to serialize instance <function Method",  # the default optimizer, in the saved config
)

# TensorBoard's "Custom scalars" page: the paper's figures and the run's health. Tags are regular expressions.
LAYOUT = {
    "Figure 6: self-revision over both phases": {
        "response length, evaluation": ["Multiline", ["eval/response_tokens$"]],
        "revision keywords per response, evaluation": ["Multiline", ["eval/keywords_per_response$"]],
        "response length, rollouts": ["Multiline", ["rollout/length$"]],
        "revision keywords per response, rollouts": ["Multiline", ["rollout/keywords_per_response$"]],
    },
    "Figure 5: accuracy and teacher synchronisation": {
        "avg@k, evaluation": ["Multiline", [r"eval/([\w-]+/)?avg_at_k$"]],  # averaged, and per benchmark
        "reward, rollouts": ["Multiline", ["rollout/reward$"]],
        "teacher generation": ["Multiline", ["teacher/generation$"]],
    },
    "Figure 4: what the reviser says": {
        "mean KL by reward": ["Multiline", ["teacher/kl_r0$", "teacher/kl_r1$"]],
        "share of the KL on a tenth of the tokens": ["Multiline", ["kl_top10_share_r0$", "kl_top10_share_r1$"]],
    },
    "Is the run well?": {
        "log-probability gap, engine against trainer": ["Multiline", ["rollout/logprob_gap$"]],
        "truncated and unparseable": ["Multiline", ["rollout/truncated$", "rollout/unparseable$", "eval/truncated$"]],
        "gradient norm": ["Multiline", ["train/grad_norm$"]],
    },
}


class SDZeroCLI(LightningCLI):
    """`sdzero fit|validate|test|predict --config FILE [--model.x ... --data.x ... --trainer.x ...]`."""

    @classmethod
    def main(cls, arguments: list[str] | None = None) -> None:
        """Runs the command that `arguments` (None: the process's own) name."""
        command, *options = sys.argv[1:] if arguments is None else arguments
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        cls(
            Policy,
            StepDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            # no sanity run: it would sample before the first step. Every batch is one step: log each
            trainer_defaults={"num_sanity_val_steps": 0, "log_every_n_steps": 1, "callbacks": Preemption()},
            # a wrong key raises, for sdzero.cli.main to say so in one line
            parser_kwargs={"prog": "sdzero", "exit_on_error": False, "allow_abbrev": False},
            args=[command, *compose_arguments(command, options)],
        )

    @classmethod
    def check(cls, arguments: list[str]) -> dict[str, Any]:
        """Parses `arguments` and builds nothing; returns the config with all defaults in it.

        Raises:
            ArgumentError: names the key that is wrong.
        """
        printed = StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            cls.main([*arguments, "--print_config"])
        return yaml.safe_load(printed.getvalue())

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":  # after_test prints its own table: Lightning's has a line per metric
            parser.set_defaults(verbose=False)
        return parser

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        root = Path(self._get(self.config_init, "trainer.default_root_dir") or ".")
        if self._get(self.config_init, "trainer.logger") is None:
            # name and version empty: curves, checkpoints and the config lie in the stage's own folder
            # flushed often: a kill loses what was not
            kwargs["logger"] = TensorBoardLogger(save_dir=root, name="", version="", flush_secs=5)
        return super().instantiate_trainer(**kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") == NEWEST:
            kwargs["ckpt_path"] = self._newest(Path(self.trainer.default_root_dir) / "checkpoints", subcommand)
        return kwargs

    def _newest(self, folder: Path, subcommand: str) -> Path | None:
        """Resolve `--ckpt_path=newest`. None (`fit` only): start from scratch.

        Raises:
            ValueError: there is no finished checkpoint for another command than `fit`.
            CheckpointError: there are finished checkpoints, and none of them verifies.
        """
        is_first = self.trainer.is_global_zero
        # a sharded strategy loads rank 0's choice on all ranks: not all have to read whole models
        newest = newest_checkpoint(folder, verify=is_first or not isinstance(self.trainer.strategy, AtomicFolders))
        if newest is None and subcommand != "fit":
            raise ValueError(f"ckpt_path={NEWEST}: there is no finished checkpoint in {folder}")
        if is_first:
            missing = f"no finished checkpoint in {folder}: starting from scratch"
            print(missing if newest is None else f"resuming from {newest}", flush=True)
        return newest

    def _run_subcommand(self, subcommand: str) -> None:
        with add_path_to_errors(Path(self.trainer.default_root_dir)):
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        if not isinstance(self.model, Method):
            raise TypeError(
                f"{type(self.model).__name__} only evaluates: to train, use a method such as sdzero.methods.SRT"
            )
        self._add_layout()

    def _add_layout(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(LAYOUT)

    before_validate = before_test = _add_layout

    def after_test(self) -> None:
        rewards = all_gather_objects(self.model.eval_rewards)
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir)
            answered = {question: answers for part in rewards for question, answers in part.items()}
            by_question = {question.id: answered[question.id] for question in self.datamodule.eval_questions}
            write_text(folder / "rewards.json", json.dumps(by_question))
            metrics = {name: float(value) for name, value in sorted(self.trainer.callback_metrics.items())}
            # a standard error from one question is NaN, which JSON does not have
            results = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
            print_evaluation(results, by_question)

    def after_predict(self) -> None:
        """Write the responses of this rank's share, one JSON object a line."""
        if share_of(self.trainer).member:
            return  # the first rank of the share writes
        rows = [row for batch in self.trainer.predict_loop.predictions for row in batch]
        write_text(rank_file(self.trainer, "predictions", "jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
