"""Streams rollouts, on-policy or one step off: sync, sample, reward, yield, once per optimizer step."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdzero.data.base import NUM_CHECKED, StepDataModule
from sdzero.data.eval_stream import Evaluation, at_least_one
from sdzero.data.prefetch import Ahead
from sdzero.data.sampler import score
from sdzero.engines.base import RolloutEngine
from sdzero.tasks.base import Task
from sdzero.types import Prompt, Question, Rollout, RolloutBatch, Sampling, ScoredRollout, Split, Verdict
from sdzero.utils.seeds import derive_seed, run_seed

log = logging.getLogger(__name__)

NUM_PROBED = 64
"""Tokens of a response that is drawn only to compare log-probabilities."""


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
        max_engine_restarts: as in StepDataModule.
        overlap: while a step trains, the rollouts of the next are drawn, from the weights before that step: training
            is off-policy by one version, but for the first step of an epoch. Needs an engine that samples elsewhere.
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
        max_engine_restarts: int = 2,
        overlap: bool = False,
    ) -> None:
        if overlap and not engine.is_remote:
            kind = type(engine).__name__
            raise ValueError(
                f"data.overlap needs an engine that samples elsewhere, such as RemoteVLLMEngine; {kind} "
                "computes where the trainer does"
            )
        at_least_one(
            num_questions=num_questions,
            prompts_per_step=prompts_per_step,
            rollouts_per_prompt=rollouts_per_prompt,
            call_size=call_size,
        )
        super().__init__(prompts_per_step, task, engine, evaluation, max_logprob_gap, engine_dtype, max_engine_restarts)
        self.num_questions = num_questions
        self.rollouts_per_prompt = rollouts_per_prompt
        self.split: Split = split
        self.sampling = sampling
        self.call_size = call_size
        self.disjoint_from = disjoint_from
        self.questions: list[Question] = []
        self.overlap = overlap
        self._saved_counter = 0
        self._ahead: Ahead | None = None
        self._restored: dict[str, Any] | None = None  # what a checkpoint says of the batch that was drawn ahead

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
        phase1 = set() if self.disjoint_from is None else _identities(self.disjoint_from)
        for name, ids in (("phase 1 (disjoint_from)", phase1), ("evaluation", held_out)):
            if shared := sorted(own & ids):
                raise ValueError(
                    f"{len(shared)} questions of phase 2 are also in {name}, e.g. {shared[:3]}: choose another split"
                )

    def max_model_len(self) -> int:
        longest = max((len(self.policy.builder.prompt(q).token_ids) for q in self.questions), default=0)
        return max(super().max_model_len(), longest + self.sampling.max_new_tokens)

    def make_batch(self, counter: int, indices: Sequence[int]) -> RolloutBatch:
        prompts = self._prompts(indices)
        batch = self._take_ahead(counter) or self._draw_now(counter, prompts)
        if self.overlap:
            batch.max_lag = 1
            batch.stats["policy_lag"] = self.policy.policy_version - batch.policy_version
            if self._goes_on(counter):
                self._draw_ahead(counter + 1)
        return batch

    def _prompts(self, indices: Sequence[int]) -> list[Prompt]:
        questions = [self.questions[i] for i in indices for _ in range(self.rollouts_per_prompt)]
        return [self.policy.builder.prompt(question) for question in questions]

    def _draw_now(self, counter: int, prompts: Sequence[Prompt]) -> RolloutBatch:
        # whole calls: what a kill leaves finished are the short responses, and a step must not lean towards them
        scored, stats = self.sample(prompts, self.sampling, _group(counter), self.call_size, keep_partial=False)
        return RolloutBatch(scored, self.policy.policy_version, counter, stats)

    # --- drawn ahead --------------------------------------------------------------------------

    def _goes_on(self, counter: int) -> bool:
        """Whether another step of this epoch comes after batch `counter`."""
        assert self.trainer is not None
        limit = self.trainer.max_steps
        is_last = 0 <= limit <= self.trainer.global_step + 1
        return not is_last and (counter + 1) % self.steps_per_epoch != 0

    def _draw_ahead(self, counter: int) -> None:
        """Begins batch `counter` with the student's weights of now, once the engine has them. Collective."""
        prompts = self._prompts(self.indices(counter))
        version, mine = self.policy.policy_version, self.share.part(prompts)
        probes, stats = self.restarts.draw(lambda: self._probe(counter, mine))
        stats |= {"engine_restarts": self.restarts.num, **self.check_policy(probes)}
        sampler = replace(self.sampler, call_size=self.call_size)

        def draw() -> list[Rollout]:
            calls = sampler.draw(mine, self.sampling, _group(counter), version, keep_partial=False)
            return [rollout for call in calls for rollout in call]

        self._ahead = Ahead(counter, version, sampler.weights, draw, stats)

    def _probe(self, counter: int, prompts: Sequence[Prompt]) -> tuple[list[ScoredRollout], dict[str, float]]:
        """Syncs, and draws beginnings of responses to compare log-probabilities by: when those of the batch itself have
        been drawn, the trainer has moved on."""
        stats = self.sync_policy()
        sampling = replace(self.sampling, max_new_tokens=min(NUM_PROBED, self.sampling.max_new_tokens))
        seed = derive_seed(run_seed(), "probe", counter, self.rank)
        version = self.policy.policy_version
        wanted = prompts[:NUM_CHECKED] if self._gap is None else []
        rollouts = self.sampler.engine.generate(wanted, sampling, seed, version)
        return [ScoredRollout(rollout, Verdict(0, "truncated")) for rollout in rollouts], stats

    def _take_ahead(self, counter: int) -> RolloutBatch | None:
        """What was drawn ahead, by this process or before a restart; None where nothing was. Collective."""
        ahead, restored = self._ahead, self._restored
        self._ahead = self._restored = None
        if ahead is not None:
            taken, version = ahead.take(), ahead.policy_version
        elif restored is not None:
            taken, version = self._from_journal(**restored), restored["policy_version"]
        else:
            return None
        if self._largest(int(taken is None)):
            log.warning("batch %d is drawn anew from the current weights: what was drawn ahead is lost", counter)
            return None
        assert taken is not None and self.task is not None
        rollouts, stats = taken
        return RolloutBatch(self.share.whole(score(rollouts, self.task)), version, counter, stats)

    def _from_journal(
        self, counter: int, policy_version: int, weights: str
    ) -> tuple[Sequence[Rollout], dict[str, float]] | None:
        sampler = replace(self.sampler, call_size=self.call_size, weights=weights)
        mine = self.share.part(self._prompts(self.indices(counter)))
        rollouts = sampler.drawn(mine, self.sampling, _group(counter), policy_version)
        return None if rollouts is None else (rollouts, {})

    def sync_policy(self) -> dict[str, float]:
        if self._ahead is not None:  # a validation comes between: one call at a time
            self._ahead.wait()
        return super().sync_policy()

    def on_exception(self, exception: BaseException) -> None:
        if self.overlap:  # else the draw under way would keep the process
            self.teardown("fit")

    def teardown(self, stage: str) -> None:
        super().teardown(stage)  # which takes back what an engine is asked for
        if self._ahead is not None:
            self._ahead.drop()
            self._ahead = None

    # --- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        # one checkpoint back is kept too: a restart may have to pass over the newest
        if self._sampler is not None and self.counter > self._saved_counter:  # several files may be saved at one step
            obsolete, self._saved_counter = self._saved_counter, self.counter
            self._sampler.journal.forget(lambda group: "train-" <= group < _group(obsolete))
        ahead = self._ahead.state() if self._ahead is not None else None  # waits: the next step would too
        return {**super().state_dict(), **({"ahead": ahead} if ahead else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._restored = state_dict.get("ahead") if self.overlap else None


def _group(counter: int) -> str:
    """The name of a batch's draw in the journal."""
    return f"train-{counter:06d}"


def _identities(path: Path) -> set[str]:
    """The question ids that `sdzero collect` wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"disjoint_from: no file {path}; `sdzero collect` writes it")
    try:
        return set(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"disjoint_from: {path} is damaged ({error}): remove it and have `sdzero collect` make it again"
        ) from None
