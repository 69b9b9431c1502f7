"""Streams on-policy rollouts from a co-located engine: sync, sample, reward, yield, once per optimizer step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdzero.data.answers import Evaluation, at_least_one
from sdzero.data.base import StepDataModule
from sdzero.engines.base import RolloutEngine
from sdzero.tasks.base import Task
from sdzero.types import Question, RolloutBatch, Sampling, Split


class RolloutDataModule(StepDataModule):
    """On-policy rollouts for phase 2.

    Args:
        task: questions and verifier.
        engine: rollout engine.
        num_questions: questions of one epoch; each epoch asks them again in a new order.
        prompts_per_step: questions of one optimizer step, over all ranks.
        rollouts_per_prompt: responses per question.
        split: split of the task.
        sampling: how responses are drawn; on-policy training wants temperature 1 and top_p 1.
        call_size: responses per generate call and rank; part of the run's identity. Smaller than a rank's share of a
            step, each call but the last leaves the engine idle towards its end.
        disjoint_from: file of `sdzero collect` with the question ids of phase 1 (questions.json), which must not
            come again here; null checks nothing.
        evaluation: what validation and test sample.
        max_logprob_gap: as in StepDataModule.
        engine_dtype: dtype of the engine's weights, `float32` or `bfloat16`.
    """

    def __init__(
        self,
        task: Task,
        engine: RolloutEngine,
        num_questions: int,
        prompts_per_step: int = 128,
        rollouts_per_prompt: int = 1,
        split: Split = "phase2",
        sampling: Sampling = Sampling(),
        call_size: int = 128,
        disjoint_from: Path | None = None,
        evaluation: Evaluation = Evaluation(),
        max_logprob_gap: float = 0.3,
        engine_dtype: str = "float32",
    ) -> None:
        at_least_one(
            num_questions=num_questions,
            prompts_per_step=prompts_per_step,
            rollouts_per_prompt=rollouts_per_prompt,
            call_size=call_size,
        )
        super().__init__(prompts_per_step, task, engine, evaluation, max_logprob_gap, engine_dtype)
        self.num_questions = num_questions
        self.rollouts_per_prompt = rollouts_per_prompt
        self.split: Split = split
        self.sampling = sampling
        self.call_size = call_size
        self.disjoint_from = disjoint_from
        self.questions: list[Question] = []
        self._saved_counter = 0

    @property
    def num_items(self) -> int:
        return len(self.questions)

    def setup_training(self) -> None:
        assert self.task is not None
        self.questions = self.task.questions(self.split, self.num_questions)
        self._check_disjoint()
        extra = getattr(self.policy, "max_extra_tokens", lambda n: 0)(self.sampling.max_new_tokens)
        self.check_length(self.questions, self.sampling.max_new_tokens, extra, f"phase 2 ({self.split})")

    def training_questions(self) -> list[Question]:
        return self.questions

    def _check_disjoint(self) -> None:
        own, held_out = {q.identity for q in self.questions}, {q.identity for q in self.eval_questions}
        if self.disjoint_from is not None and not self.disjoint_from.is_file():
            raise FileNotFoundError(f"disjoint_from: no file {self.disjoint_from}; `sdzero collect` writes it")
        phase1 = set(json.loads(self.disjoint_from.read_text())) if self.disjoint_from is not None else set()
        for name, ids in (("phase 1 (disjoint_from)", phase1), ("evaluation", held_out)):
            if shared := sorted(own & ids):
                raise ValueError(
                    f"{len(shared)} questions of phase 2 are also in {name}, e.g. {shared[:3]}: choose another split"
                )

    def max_model_len(self) -> int:
        longest = max((len(self.policy.builder.prompt(q).token_ids) for q in self.questions), default=0)
        return max(super().max_model_len(), longest + self.sampling.max_new_tokens)

    def make_batch(self, counter: int, indices: Sequence[int]) -> RolloutBatch:
        questions = [self.questions[i] for i in indices for _ in range(self.rollouts_per_prompt)]
        prompts = [self.policy.builder.prompt(question) for question in questions]
        # whole calls: what a kill leaves finished are the short responses, and a step must not lean towards them
        scored, stats = self.sample(prompts, self.sampling, f"train-{counter:06d}", self.call_size, keep_partial=False)
        return RolloutBatch(scored, self.policy.policy_version, counter, stats)

    def state_dict(self) -> dict[str, Any]:
        # one checkpoint back is kept too: a restart may have to pass over the newest
        if self._sampler is not None and self.counter > self._saved_counter:  # several files may be saved at one step
            obsolete, self._saved_counter = self._saved_counter, self.counter
            self._sampler.journal.forget(lambda group: "train-" <= group < f"train-{obsolete:06d}")
        return super().state_dict()
