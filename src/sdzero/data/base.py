"""Base of the data modules: order of items, rollout engine, and evaluation; the data module of an evaluation."""

from __future__ import annotations

import json
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, IterableDataset

from sdzero.data.eval_stream import EvalStream, Evaluation
from sdzero.data.journal import CallJournal
from sdzero.data.policy_sampler import Policy, PolicySampler, Sampled
from sdzero.data.sampler import Sampler
from sdzero.engines.base import EngineSpec, RolloutEngine
from sdzero.models.language_model import max_positions
from sdzero.tasks.base import Task
from sdzero.trainer.shares import Share, share_of
from sdzero.types import Prompt, Question, Sampling, TraceBatch
from sdzero.utils.files import write_text
from sdzero.utils.seeds import derive_seed, run_seed


class _Stream(IterableDataset[Any]):
    """Iterable with a length: without one Lightning prefetches a batch, which would be sampled before the update."""

    def __init__(self, length: int, items: Callable[[], Iterator[Any]]) -> None:
        self.length, self.items = length, items

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return self.items()


def stream_loader(length: int, items: Callable[[], Iterator[Any]]) -> DataLoader[Any]:
    """DataLoader over `items()`, which makes whole batches."""
    # its own generator: each new iterator takes a number from it, and a resumed run makes other iterators
    return DataLoader(_Stream(length, items), batch_size=None, num_workers=0, generator=torch.Generator())


class StepDataModule(L.LightningDataModule):
    """One training batch is one optimizer step; validation and test sample from the policy.

    Args:
        items_per_step: number of questions (or traces) of one optimizer step, over all ranks.
        task: questions and verifier; needed for sampling.
        engine: rollout engine; needed for sampling.
        evaluation: questions and sampling of validation and test.
        max_logprob_gap: mean absolute difference between the engine's and the trainer's log-probabilities of the
            same tokens, in nats, above which the run stops because the weights must differ. About 1e-4 is normal in
            float32, 0.1 in bfloat16.
        engine_dtype: dtype of the engine's weights, `float32` or `bfloat16`.
        max_engine_restarts: maximum number of restarts, with the current weights, of an engine that crashed, timed out
            or returned garbage; then the run stops.
    """

    trainer: L.Trainer  # pyright: ignore[reportIncompatibleVariableOverride] - attached before the first hook

    def __init__(
        self,
        items_per_step: int,
        task: Task | None = None,
        engine: RolloutEngine | None = None,
        evaluation: Evaluation = Evaluation(),
        max_logprob_gap: float = 0.3,
        engine_dtype: str = "float32",
        max_engine_restarts: int = 2,
    ) -> None:
        super().__init__()
        assert items_per_step > 0
        self.items_per_step = items_per_step
        self.task = task
        self.engine = engine
        self.evaluation = evaluation
        self.max_logprob_gap = max_logprob_gap
        self.engine_dtype = engine_dtype
        if max_engine_restarts < 0:
            raise ValueError(f"data.max_engine_restarts must be at least 0, got {max_engine_restarts}")
        self.max_engine_restarts = max_engine_restarts
        self.counter = 0
        self.eval_questions: list[Question] = []
        self._sampler: PolicySampler | None = None

    # --- defined by a subclass ----------------------------------------------------------------

    @property
    @abstractmethod
    def num_items(self) -> int:
        """Number of questions or traces of one epoch."""

    @abstractmethod
    def make_batch(self, counter: int, indices: Sequence[int]) -> Any:
        """Make batch number `counter` for this rank's share."""

    def setup_training(self) -> None:
        """Load and check the training items."""

    def training_questions(self) -> list[Question]:
        """Return the questions of the training items."""
        return []

    # --- order and position -------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        return cast(Policy, self.trainer.lightning_module)

    @property
    def rank(self) -> int:
        return self.trainer.global_rank

    @property
    def share(self) -> Share:
        """This rank's share of the items. Ranks that compute a batch together have one share."""
        return share_of(self.trainer)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_items / self.items_per_step)

    def indices(self, counter: int) -> list[int]:
        """Return the share's items of batch `counter`: each epoch is a new shuffle; the last batch may be short."""
        epoch, step = divmod(counter, self.steps_per_epoch)
        order = list(range(self.num_items))
        random.Random(derive_seed(run_seed(), "order", epoch)).shuffle(order)
        items = order[step * self.items_per_step : (step + 1) * self.items_per_step]
        return items[self.share.index :: self.share.num_shares]

    def train_dataloader(self) -> DataLoader[Any]:
        return stream_loader(self.steps_per_epoch, self._batches)

    def _batches(self) -> Iterator[Any]:
        end = (self.counter // self.steps_per_epoch + 1) * self.steps_per_epoch
        while self.counter < end:
            batch = self.make_batch(self.counter, self.indices(self.counter))
            self.counter += 1  # before the step, so that a checkpoint after it does not repeat the batch
            if self._sampler is not None and self.engine is not None:  # also after a validation: training needs memory
                self.engine.sleep()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"counter": self.counter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counter = state_dict["counter"]

    # --- sampling -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        needs = self.evaluation.is_enabled or stage != "fit"
        if needs and (self.task is None or self.engine is None or not self.evaluation.is_enabled):
            raise ValueError("evaluation needs data.task, data.engine and data.evaluation.num_questions above 0")
        if self.task is not None and self.evaluation.is_enabled:
            self.eval_questions = self.task.questions(self.evaluation.split, self.evaluation.num_questions)
            if not self.eval_questions:
                raise ValueError(f"data.evaluation.split: {self.evaluation.split!r} of data.task holds no question")
            self.check_length(self.eval_questions, self.evaluation.sampling.max_new_tokens, 0, "evaluation")
        if stage == "fit":
            self.setup_training()
        self._write_questions(stage)

    def _write_questions(self, stage: str) -> None:
        """Write `questions-STAGE.json`: identities of the questions of each split in use, and counts of rows that the
        task left out."""
        if not self.trainer.is_global_zero:
            return
        used = {"train": self.training_questions(), "eval": self.eval_questions}
        rows: dict[str, Any] = {name: sorted({q.identity for q in questions}) for name, questions in used.items()}
        rows["left_out"] = {} if self.task is None else self.task.exclusions()
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"questions-{TrainerFn(stage).value}.json", json.dumps(rows, indent=1) + "\n")

    @property
    def max_positions(self) -> int:
        return max_positions(self.policy.hf_config)

    def check_length(self, questions: Sequence[Question], max_new_tokens: int, num_extra: int, use: str) -> None:
        """Check that prompt + response + `num_extra` tokens of a teacher's context fit the model.

        Raises:
            ValueError: they do not; `use` says what they are for.
        """
        longest = self.policy.builder.max_prompt_len(questions)
        total = longest + max_new_tokens + num_extra
        if total > self.max_positions:
            raise ValueError(
                f"{use}: the longest prompt ({longest}) + sampling.max_new_tokens ({max_new_tokens}) + the teacher's "
                f"context ({num_extra}) is {total} tokens, but the model has {self.max_positions} positions. "
                "Lower sampling.max_new_tokens or use a model with a longer context"
            )

    def max_model_len(self) -> int:
        """Return the engine's limit in tokens: a revision of a response reads y and P_r, and writes y again."""
        if not self.eval_questions:
            return 1
        builder, sampling = self.policy.builder, self.evaluation.sampling
        longest = builder.max_prompt_len(self.eval_questions)
        return min(longest + 2 * sampling.max_new_tokens + builder.max_bridge_len, self.max_positions)

    @property
    def sampler(self) -> PolicySampler:
        """The engine with its journal, started on first use."""
        if self._sampler is None:
            assert self.engine is not None and self.task is not None
            journal = CallJournal(Path(self.trainer.default_root_dir) / "journal" / f"rank{self.rank}")
            calls = Sampler(self.engine, self.task, journal, self.evaluation.call_size, run_seed(), self.rank)
            if getattr(self.engine, "tensor_parallel_size", 1) > 1:
                calls.all_reduce_max = self.all_reduce_max
            self._sampler = PolicySampler(
                calls,
                EngineSpec(self.policy.student_config.path, self.max_model_len(), self.engine_dtype),
                self.policy.builder,
                self.policy,
                self.share,
                self.max_engine_restarts,
                self.max_logprob_gap,
                self.all_reduce_max,
            )
            self._sampler.start()
        return self._sampler

    def all_reduce_max(self, value: int) -> int:
        """Return the maximum of a number over all ranks. Collective."""
        strategy = self.trainer.strategy
        tensor = torch.tensor(value, device=strategy.root_device)
        return int(strategy.reduce(tensor, reduce_op="max"))  # pyright: ignore[reportArgumentType] - a name is accepted

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, call_size: int, keep_partial: bool = True
    ) -> Sampled:
        """Sample as PolicySampler does."""
        return self.sampler.sample(prompts, sampling, group, call_size, keep_partial)

    # --- evaluation ---------------------------------------------------------------------------

    def test_dataloader(self) -> DataLoader[Any]:
        limit = self.max_model_len()
        stream = EvalStream(self.evaluation, self.eval_questions, self.policy, self.sample, limit, self.share)
        return stream_loader(len(stream), stream.__iter__)

    predict_dataloader = test_dataloader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.test_dataloader() if self.eval_questions else []

    def teardown(self, stage: str) -> None:
        if self._sampler is not None:
            self._sampler.sampler.engine.close()
            self._sampler = None


class EvaluationDataModule(StepDataModule):
    """Responses to held-out questions, without training data: for `sdzero validate`, `test` and `predict`.

    Args:
        task: questions and verifier.
        engine: rollout engine.
        evaluation: questions and sampling.
        kwargs: as in StepDataModule.
    """

    def __init__(self, task: Task, engine: RolloutEngine, evaluation: Evaluation, **kwargs: Any) -> None:
        super().__init__(1, task, engine, evaluation, **kwargs)

    @property
    def num_items(self) -> int:
        return 0

    def make_batch(self, counter: int, indices: Sequence[int]) -> TraceBatch:
        raise TypeError("EvaluationDataModule holds no training data: use RolloutDataModule or TraceDataModule")
