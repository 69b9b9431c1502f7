"""Batches of rollouts, on-policy or one version behind: sync, sample, score, once per optimizer step."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdzero.data.base import StepDataModule
from sdzero.data.eval_stream import check_positive
from sdzero.data.policy_sampler import NUM_CHECKED, Sampled
from sdzero.data.prefetch import PrefetchedBatch
from sdzero.data.sampler import score
from sdzero.engines.base import RolloutEngine
from sdzero.tasks.base import Task
from sdzero.types import Prompt, Question, Rollout, RolloutBatch, Sampling, ScoredRollout, Split, Verdict
from sdzero.utils.seeds import derive_seed, run_seed

log = logging.getLogger(__name__)

NUM_PROBED = 64
"""Tokens of a response that is sampled only to compare log-probabilities."""


class RolloutDataModule(StepDataModule):
    """On-policy rollouts (phase 2).

    Args:
        task: questions and verifier.
        engine: rollout engine.
        num_questions: number of questions of one epoch; each epoch has a new order.
        prompts_per_step: number of questions of one optimizer step, over all ranks.
        rollouts_per_prompt: number of responses per question.
        split: split of the task.
        sampling: sampling parameters; self-distillation on-policy needs temperature 1, every method top_p 1.
        call_size: responses per generate call and rank; part of the run's identity. If it is smaller than a rank's
            share of a step, the engine is partly idle at the end of each call.
        disjoint_from: questions.json of `sdzero collect`, whose questions must not occur here; null checks nothing.
        overlap: generate the rollouts of the next step while a step trains, from the weights before that step. Training
            is then off-policy by one version, except in the first step of an epoch. Needs a remote engine.
        kwargs: as in StepDataModule.
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
        overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        if overlap and not engine.is_remote:
            raise ValueError(
                f"data.overlap needs a remote engine, such as RemoteVLLMEngine; {type(engine).__name__} uses the "
                "trainer's devices"
            )
        check_positive(
            num_questions=num_questions,
            prompts_per_step=prompts_per_step,
            rollouts_per_prompt=rollouts_per_prompt,
            call_size=call_size,
        )
        super().__init__(prompts_per_step, task, engine, **kwargs)
        self.num_questions = num_questions
        self.rollouts_per_prompt = rollouts_per_prompt
        self.split: Split = split
        self.sampling = sampling
        self.call_size = call_size
        self.disjoint_from = disjoint_from
        self.questions: list[Question] = []
        self.overlap = overlap
        self._saved_counter = 0
        self._prefetched: PrefetchedBatch | None = None
        self._restored: dict[str, Any] | None = None  # identity of a checkpoint's prefetched batch

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
        longest = self.policy.builder.max_prompt_len(self.questions)
        return max(super().max_model_len(), longest + self.sampling.max_new_tokens)

    def make_batch(self, counter: int, indices: Sequence[int]) -> RolloutBatch:
        prompts = self._prompts(indices)
        batch = self._take_prefetched(counter) or self._sample_batch(counter, prompts)
        batch.sampling = self.sampling
        if self.overlap:
            batch.max_lag = 1
            batch.stats["policy_lag"] = self.policy.policy_version - batch.policy_version
            if not self._ends_epoch(counter):
                self._prefetch(counter + 1)
        return batch

    def _prompts(self, indices: Sequence[int]) -> list[Prompt]:
        questions = [self.questions[i] for i in indices for _ in range(self.rollouts_per_prompt)]
        return [self.policy.builder.prompt(question) for question in questions]

    def _sample_batch(self, counter: int, prompts: Sequence[Prompt]) -> RolloutBatch:
        # whole calls: the finished responses of a killed call are its short ones, which would bias the step
        scored, stats = self.sample(prompts, self.sampling, _group(counter), self.call_size, keep_partial=False)
        return RolloutBatch(scored, self.policy.policy_version, counter, stats)

    # --- prefetch -----------------------------------------------------------------------------

    def _ends_epoch(self, counter: int) -> bool:
        """Return whether batch `counter` is the last of the epoch or of the training."""
        is_last = 0 <= self.trainer.max_steps <= self.trainer.global_step + 1
        return is_last or (counter + 1) % self.steps_per_epoch == 0

    def _prefetch(self, counter: int) -> None:
        """Start batch `counter` with the student's current weights, once the engine has them. Collective."""
        prompts = self._prompts(self.indices(counter))
        version, own = self.policy.policy_version, self.share.scatter(prompts)
        probes, stats = self.sampler.retry(lambda: self._probe(counter, own))
        stats |= self.sampler.check(probes)
        calls = replace(self.sampler.sampler, call_size=self.call_size)

        def generate() -> list[Rollout]:
            batches = calls.generate(own, self.sampling, _group(counter), version, keep_partial=False)
            return [rollout for batch in batches for rollout in batch]

        self._prefetched = PrefetchedBatch(counter, version, calls.weights, generate, stats)

    def _probe(self, counter: int, prompts: Sequence[Prompt]) -> Sampled:
        """Sync, and sample beginnings of responses to compare log-probabilities: once those of the batch itself are
        there, the trainer has other weights."""
        stats = self.sampler.sync()
        sampling = replace(self.sampling, max_new_tokens=min(NUM_PROBED, self.sampling.max_new_tokens))
        seed = derive_seed(run_seed(), "probe", counter, self.rank)
        version = self.policy.policy_version
        wanted = prompts[:NUM_CHECKED] if self.sampler.logprob_gap is None else []
        rollouts = self.sampler.sampler.engine.generate(wanted, sampling, seed, version)
        return [ScoredRollout(rollout, Verdict(0, "truncated")) for rollout in rollouts], stats

    def _take_prefetched(self, counter: int) -> RolloutBatch | None:
        """Return the batch that was prefetched by this process or before a restart, or None. Collective."""
        prefetched, restored = self._prefetched, self._restored
        self._prefetched = self._restored = None
        if prefetched is not None:
            taken, version = prefetched.result(), prefetched.policy_version
        elif restored is not None:
            taken, version = self._from_journal(**restored), restored["policy_version"]
        else:
            return None
        if self.all_reduce_max(int(taken is None)):
            log.warning("batch %d is sampled again with the current weights: the prefetched one is lost", counter)
            return None
        assert taken is not None and self.task is not None
        rollouts, stats = taken
        return RolloutBatch(self.share.gather(score(rollouts, self.task)), version, counter, stats)

    def _from_journal(
        self, counter: int, policy_version: int, weights: str
    ) -> tuple[Sequence[Rollout], dict[str, float]] | None:
        calls = replace(self.sampler.sampler, call_size=self.call_size, weights=weights)
        own = self.share.scatter(self._prompts(self.indices(counter)))
        rollouts = calls.from_journal(own, self.sampling, _group(counter), policy_version)
        return None if rollouts is None else (rollouts, {})

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, call_size: int, keep_partial: bool = True
    ) -> Sampled:
        if self._prefetched is not None:  # a validation between two steps: one call at a time
            self._prefetched.wait()
        return super().sample(prompts, sampling, group, call_size, keep_partial)

    def on_exception(self, exception: BaseException) -> None:
        if self.overlap:  # else the thread that generates would keep the process alive
            self.teardown("fit")

    def teardown(self, stage: str) -> None:
        super().teardown(stage)  # closing the engine ends its calls
        if self._prefetched is not None:
            self._prefetched.discard()
            self._prefetched = None

    # --- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        # groups since the last checkpoint but one are kept: a restart may have to skip the newest checkpoint
        if self._sampler is not None and self.counter > self._saved_counter:  # several files may be saved at one step
            obsolete, self._saved_counter = self._saved_counter, self.counter
            self._sampler.sampler.journal.delete(lambda group: "train-" <= group < _group(obsolete))
        prefetched = self._prefetched.state_dict() if self._prefetched is not None else None  # waits, as a step would
        return {**super().state_dict(), **({"prefetched": prefetched} if prefetched else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._restored = state_dict.get("prefetched") if self.overlap else None


def _group(counter: int) -> str:
    """Return the name of a batch's calls in the journal."""
    return f"train-{counter:06d}"


def _identities(path: Path) -> set[str]:
    """Read the question identities that `sdzero collect` wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"disjoint_from: no file {path}; `sdzero collect` writes it")
    try:
        return set(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"disjoint_from: {path} is damaged ({error}): remove it and have `sdzero collect` make it again"
        ) from None
