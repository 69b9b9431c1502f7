"""What both data modules share: the order of items, the rollout engine, and the evaluation."""

from __future__ import annotations

import json
import math
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, IterableDataset

from sdzero.data.engine_restarts import Restarts
from sdzero.data.eval_stream import AnswerStream, Evaluation, Policy
from sdzero.data.sampler import CallJournal, Sampler
from sdzero.engines.base import EngineError, EngineSpec, RolloutEngine
from sdzero.tasks.base import Task
from sdzero.trainer.strategies import Share, share_of
from sdzero.types import Prompt, Question, Sampling, ScoredRollout
from sdzero.utils.files import write_text
from sdzero.utils.seeds import derive_seed, run_seed

NUM_CHECKED = 4
"""Responses scored by the trainer after each sync, to compare log-probabilities."""


class _Stream(IterableDataset[Any]):
    """Has a length on purpose: without one Lightning fetches a batch ahead, sampled before the last update."""

    def __init__(self, length: int, items: Callable[[], Iterator[Any]]) -> None:
        self.length, self.items = length, items

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return self.items()


def stream_loader(length: int, items: Callable[[], Iterator[Any]]) -> DataLoader[Any]:
    # a generator of its own: each iterator draws from it, and a run that resumes makes other iterators
    return DataLoader(_Stream(length, items), batch_size=None, num_workers=0, generator=torch.Generator())


class StepDataModule(L.LightningDataModule):
    """One training batch is one optimizer step; validation and test sample from the policy.

    Args:
        items_per_step: questions (or traces) of one optimizer step, over all ranks.
        task: questions and verifier; needed for sampling.
        engine: rollout engine; needed for sampling.
        evaluation: what validation and test sample.
        max_logprob_gap: mean absolute difference between the engine's and the trainer's log-probabilities of the
            same tokens, in nats, above which the run stops: the engine holds other weights. About 1e-4 in
            float32 and 0.1 in bfloat16.
        engine_dtype: dtype of the engine's weights, `float32` or `bfloat16`.
        max_engine_restarts: times that an engine which died, returned nothing or passed its deadline is started anew,
            from the current weights, before the run stops.
    """

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
        self.restarts = Restarts(max_engine_restarts, self._restart_engine, self._largest)
        self.counter = 0
        self.eval_questions: list[Question] = []
        self._sampler: Sampler | None = None
        self._is_warm = False
        self._gap: float | None = None  # between the log-probabilities; None: not compared since the sync

    # --- what a data module adds --------------------------------------------------------------

    @property
    @abstractmethod
    def num_items(self) -> int:
        """Questions or traces of one epoch."""

    @abstractmethod
    def make_batch(self, counter: int, indices: Sequence[int]) -> Any:
        """Batch number `counter` of this rank's share."""

    # --- order and position -------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        assert self.trainer is not None
        return cast(Policy, self.trainer.lightning_module)

    @property
    def rank(self) -> int:
        assert self.trainer is not None
        return self.trainer.global_rank

    @property
    def share(self) -> Share:
        """Which share of the items is this rank's. Ranks that compute a batch together have one share."""
        assert self.trainer is not None
        return share_of(self.trainer)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_items / self.items_per_step)

    def indices(self, counter: int) -> list[int]:
        """The share's items of batch `counter`: each epoch is a new shuffle; the last batch may be short."""
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
            self.counter += 1  # before the step: a checkpoint taken after it must not repeat the batch
            if self._sampler is not None:  # also after a validation: training needs the memory
                self._sampler.engine.sleep()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"counter": self.counter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counter = state_dict["counter"]

    # --- sampling -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        needs = self.evaluation.asks or stage != "fit"
        if needs and (self.task is None or self.engine is None or not self.evaluation.asks):
            raise ValueError("evaluation needs data.task, data.engine and data.evaluation.num_questions above 0")
        if self.task is not None and self.evaluation.asks:
            self.eval_questions = self.task.questions(self.evaluation.split, self.evaluation.num_questions)
            if not self.eval_questions:
                raise ValueError(f"data.evaluation.split: {self.evaluation.split!r} of data.task holds no question")
            self.check_length(self.eval_questions, self.evaluation.sampling.max_new_tokens, 0, "evaluation")
        if stage == "fit":
            self.setup_training()
        self._write_questions(stage)

    def setup_training(self) -> None:
        """Gets the training items, and checks them."""

    def training_questions(self) -> list[Question]:
        """The questions of the training items."""
        return []

    def _write_questions(self, stage: str) -> None:
        """`questions-STAGE.json` in the stage's folder: the identities of the questions of each split that it uses, and
        what its task left out."""
        assert self.trainer is not None
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
        return int(getattr(self.policy.hf_config, "max_position_embeddings", None) or 2**31)

    def check_length(self, questions: Sequence[Question], max_new_tokens: int, num_extra: int, what: str) -> None:
        """Raises: ValueError if prompt + response + what a teacher reads besides cannot fit the model."""
        longest = max(len(self.policy.builder.prompt(q).token_ids) for q in questions)
        total = longest + max_new_tokens + num_extra
        if total > self.max_positions:
            raise ValueError(
                f"{what}: the longest prompt ({longest}) + sampling.max_new_tokens ({max_new_tokens}) + the teacher's "
                f"context ({num_extra}) is {total} tokens, but the model has {self.max_positions} positions. "
                "Lower sampling.max_new_tokens or take a model with a longer context"
            )

    def max_model_len(self) -> int:
        """The engine's limit, derived: an evaluated answer may be revised, which reads y and P_r and writes y again."""
        if not self.eval_questions:
            return 1
        longest = max(len(self.policy.builder.prompt(q).token_ids) for q in self.eval_questions)
        bridge = max(len(self.policy.builder.bridge(r)) for r in (0, 1))
        return min(longest + 2 * self.evaluation.sampling.max_new_tokens + bridge, self.max_positions)

    @property
    def sampler(self) -> Sampler:
        """The engine with its journal, started on first use."""
        if self._sampler is None:
            assert self.trainer is not None and self.engine is not None and self.task is not None
            self._start_engine()
            journal = CallJournal(Path(self.trainer.default_root_dir) / "journal" / f"rank{self.rank}")
            self._sampler = Sampler(self.engine, self.task, journal, self.evaluation.call_size, run_seed(), self.rank)
            if getattr(self.engine, "tensor_parallel_size", 1) > 1:
                self._sampler.largest = self._largest
        return self._sampler

    def _start_engine(self) -> None:
        assert self.engine is not None
        spec = EngineSpec(self.policy.student_config.path, self.max_model_len(), self.engine_dtype)
        self.engine.start(spec, self.policy.builder)
        self._is_warm = False

    def _restart_engine(self) -> None:
        """On all ranks, whosever died: they gather the weights of the next sync together, and some engines start so."""
        assert self.engine is not None
        self.engine.close()
        self._start_engine()

    def _largest(self, value: int) -> int:
        assert self.trainer is not None
        strategy = self.trainer.strategy
        tensor = torch.tensor(value, device=strategy.root_device)
        return int(strategy.reduce(tensor, reduce_op="max"))  # pyright: ignore[reportArgumentType] - a name will do

    def sync_policy(self) -> dict[str, float]:
        """Brings the engine to the policy's version where it holds another, and warms it up once. Collective."""
        sampler, version = self.sampler, self.policy.policy_version
        sampler.engine.wake()
        if sampler.engine.policy_version == version:
            return {"sync_seconds": 0.0, "warmup_seconds": 0.0}
        report = sampler.engine.sync(self.policy.policy_weights(), version)
        sampler.weights = report.checksum
        self._gap = None
        return {"sync_seconds": report.seconds, "warmup_seconds": self._warm_up()}

    def _warm_up(self) -> float:
        """Seconds of the engine's first moves, which are taken out of the first draw's."""
        if self._is_warm:
            return 0.0
        started = time.monotonic()
        self.sampler.engine.warm_up()
        self._is_warm = True
        return time.monotonic() - started

    def check_policy(self, scored: Sequence[ScoredRollout]) -> dict[str, float]:
        """Compares log-probabilities once per sync. Collective.

        Raises:
            EngineError: the engine's differ from the trainer's by more than `max_logprob_gap`.
        """
        if self._gap is not None:
            return {"logprob_gap": self._gap}
        num_checked = max(NUM_CHECKED, self.share.num_members)  # one or more of each member's engine
        rollouts = [s.rollout for s in scored if s.rollout.token_ids][:num_checked]
        gaps = [
            abs(theirs - ours)
            for rollout, logprobs in zip(rollouts, self.policy.policy_logprobs(rollouts), strict=True)
            for theirs, ours in zip(rollout.logprobs, logprobs.tolist(), strict=True)
        ]
        gap = sum(gaps) / max(len(gaps), 1)
        if not gap <= self.max_logprob_gap:
            raise EngineError(
                f"after the sync of policy version {self.policy.policy_version} the engine's log-probabilities "
                f"are {gap:.4g} nats off the trainer's (max_logprob_gap={self.max_logprob_gap}): "
                "stale or garbled weights"
            )
        self._gap = gap
        return {"logprob_gap": gap}

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, call_size: int, keep_partial: bool = True
    ) -> tuple[list[ScoredRollout], dict[str, float]]:
        """Scored responses of the current policy, and figures of the sampling. Collective over ranks.

        The prompts are those of this rank's share: its members draw a part each, and all of them get the whole.
        """

        def draw() -> tuple[list[ScoredRollout], dict[str, float]]:
            stats = self.sync_policy()
            started = time.monotonic()
            self.sampler.call_size = call_size
            version = self.policy.policy_version
            mine = self.share.part(prompts)
            scored = self.sampler.sample(mine, sampling, group, version, keep_partial=keep_partial)
            return scored, {**stats, "generate_seconds": time.monotonic() - started}

        mine, stats = self.restarts.draw(draw)
        scored = self.share.whole(mine)
        return scored, {**stats, "engine_restarts": self.restarts.num, **self.check_policy(scored)}

    # --- evaluation ---------------------------------------------------------------------------

    def _answers(self) -> DataLoader[Any]:
        limit = self.max_model_len()
        index, num_shares = self.share.index, self.share.num_shares
        stream = AnswerStream(self.evaluation, self.eval_questions, self.policy, self.sample, limit, index, num_shares)
        return stream_loader(len(stream), stream.__iter__)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._answers() if self.eval_questions else []

    def test_dataloader(self) -> DataLoader[Any]:
        return self._answers()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._answers()

    def teardown(self, stage: str) -> None:
        if self._sampler is not None:
            self._sampler.engine.close()
            self._sampler = None
