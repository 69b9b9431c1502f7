"""Phase 1 data (section 2.1, appendix C.1): sample, verify, ask for a revision, verify, keep.

A killed collection continues: finished generate calls are kept in OUT/journal. OUT then holds traces.jsonl
(D_revision), questions.json (the identities of all questions asked) and statistics.json.

On several devices each engine makes the calls of its share of the questions. What a call is does not depend on how many
there are: D_revision is the same, and a collection may go on on another number of them.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdzero.data.engine_restarts import Restarts
from sdzero.data.launch import Ranks, launch
from sdzero.data.sampler import CallJournal, Sampler
from sdzero.data.trace_file import write_traces
from sdzero.engines.base import EngineSpec, RolloutEngine
from sdzero.models.language_model import ModelConfig, folder_sha256
from sdzero.prompts import PromptBuilder
from sdzero.tasks.base import Task
from sdzero.types import Prompt, Question, Sampling, ScoredRollout, Split, Trace
from sdzero.utils.files import write_text
from sdzero.utils.seeds import derive_seed, run_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """What asks the questions."""

    sampler: Sampler
    builder: PromptBuilder
    questions: Sequence[Question]
    ranks: Ranks
    restarts: Restarts | None

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, group: str) -> list[ScoredRollout]:
        if self.restarts is None:
            return self.sampler.sample(prompts, sampling, group, 0)
        return self.restarts.draw(lambda: self.sampler.sample(prompts, sampling, group, 0))


@dataclass
class Collect:
    """Samples first attempts and revisions of phase 1's questions and writes D_revision.

    Args:
        student: the model that answers.
        task: questions and verifier.
        engine: rollout engine.
        out: folder to write.
        num_questions: questions to ask; all of them are asked before traces are drawn.
        split: split of the task.
        num_initial: first attempts per question.
        num_revisions: revisions per first attempt.
        num_traces: traces to draw, at random from the verified ones; null keeps all.
        correct_share: share of the drawn traces with a correct first attempt (r=1); null draws as they come.
        branches: `both`, or `incorrect` keeps only traces whose first attempt was wrong.
        verified_only: keep only verified-correct revisions; false is the ablation of table 15.
        sampling: how answers are drawn.
        call_size: answers per generate call; part of the run's identity.
        engine_dtype: dtype of the engine's weights, `float32` or `bfloat16`.
        devices: processes on each node, one a GPU; `auto` takes all GPUs that it sees, or one process without any.
        num_nodes: nodes; several need a launcher such as torchrun or srun.
        max_engine_restarts: times that an engine which died, returned nothing or passed its deadline is started anew
            before the collection stops. Of vLLM on several devices none is: the collection stops, and goes on from its
            finished calls when it is started again.
    """

    student: ModelConfig
    task: Task
    engine: RolloutEngine
    out: Path
    num_questions: int = 10_000
    split: Split = "phase1"
    num_initial: int = 1
    num_revisions: int = 3
    num_traces: int | None = 6_000
    correct_share: float | None = None
    branches: Literal["both", "incorrect"] = "both"
    verified_only: bool = True
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, max_new_tokens=16384))
    call_size: int = 512
    engine_dtype: str = "float32"
    devices: int | Literal["auto"] = 1
    num_nodes: int = 1
    max_engine_restarts: int = 2

    def __post_init__(self) -> None:
        if self.max_engine_restarts < 0:
            raise ValueError(f"max_engine_restarts must be at least 0, got {self.max_engine_restarts}")
        for name in ("num_questions", "num_initial", "num_revisions", "call_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_traces is not None and self.num_traces < 1:
            raise ValueError(f"num_traces must be at least 1, or null to keep all, got {self.num_traces}")
        if self.num_nodes < 1 or (self.devices != "auto" and self.devices < 1):
            raise ValueError(f"devices and num_nodes must be at least 1, got {self.devices} and {self.num_nodes}")
        if self.correct_share is not None and not 0 <= self.correct_share <= 1:
            raise ValueError(f"correct_share must lie in [0, 1], got {self.correct_share}")

    def run(self) -> None:
        """Raises: ValueError where no trace was left, with the counts that say why."""
        builder = self.student.builder()
        questions = self.task.questions(self.split, self.num_questions)
        spec = EngineSpec(self.student.path, self._max_model_len(builder, questions), self.engine_dtype, True)
        ranks = launch(self.devices, self.num_nodes, getattr(self.engine, "tensor_parallel_size", 1))
        self.out.mkdir(parents=True, exist_ok=True)

        def start(again: bool) -> None:
            if again:
                self.engine.close()
            self.engine.start(spec, builder)
            self.engine.warm_up()

        try:
            start(again=False)
            restarts = None
            if (
                ranks.world_size == 1 or not self.engine.starts_collectively
            ):  # the other ranks are in calls of their own
                restarts = Restarts(self.max_engine_restarts, lambda: start(again=True), ranks.largest)
            job = _Job(self._sampler(ranks), builder, questions, ranks, restarts)
            self._say_idle(job)
            counts, kept = self._ask_all(job)
            chosen = self._draw(kept)  # the same on all ranks
            traces = self._chosen_traces(job, chosen)
            if ranks.is_first:
                write_traces(self.out / "traces.jsonl", traces)
            else:
                deque(traces, 0)
        finally:
            self.engine.close()
        if ranks.is_first:
            self._finish(questions, _statistics(counts, kept, chosen, job.sampler.journal.num_started), counts, kept)

    def _sampler(self, ranks: Ranks) -> Sampler:
        weights = folder_sha256(Path(self.student.path)) if Path(self.student.path).is_dir() else self.student.path
        weights = f"{weights}/{self.engine_dtype}"  # a call made in another dtype is another call
        folder = self.out / "journal"
        # beside the rank that leads their engine, the others make its calls without a prompt of their own
        journal = CallJournal(folder, ranks.rank) if ranks.leads else CallJournal(folder / f"rank{ranks.rank}")
        return Sampler(
            self.engine, self.task, journal, self.call_size, run_seed(), weights=weights, largest=ranks.largest
        )

    def _say_idle(self, job: _Job) -> None:
        num_chunks, num_engines = _num_chunks(job.questions, self.call_size), job.ranks.num_engines
        if job.ranks.is_first and num_chunks < num_engines:
            log.warning(
                "call_size: %d questions are %d chunks of at most %d, so %d of %d engines have nothing to do",
                *(len(job.questions), num_chunks, self.call_size, num_engines - num_chunks, num_engines),
            )

    def _finish(
        self,
        questions: Sequence[Question],
        statistics: dict[str, Any],
        counts: Counter[str],
        kept: Sequence[tuple[int, int, int, int]],
    ) -> None:
        statistics = {**statistics, "left_out": self.task.exclusions()}
        write_text(self.out / "questions.json", json.dumps([q.identity for q in questions]))
        write_text(self.out / "statistics.json", json.dumps(statistics, indent=2) + "\n")
        print(json.dumps(statistics, indent=2), flush=True)
        if not statistics["traces"]:
            raise ValueError(self._why_none(counts, kept))
        if self.num_traces is not None and statistics["traces"] < self.num_traces:
            log.warning("num_traces: wanted %d, but only %d could be drawn", self.num_traces, statistics["traces"])

    def _why_none(self, counts: Counter[str], kept: Sequence[tuple[int, int, int, int]]) -> str:
        revisions = sum(counts[f"revision_r{r}/generations"] for r in (0, 1))
        correct = sum(counts[f"revision_r{r}/correct"] for r in (0, 1))
        by_reward = [sum(k[3] == r for k in kept) for r in (0, 1)]
        return (
            f"no trace was left: of {revisions} revisions {correct} were verified as correct, and {len(kept)} could be "
            f"kept ({by_reward[0]} with r=0, {by_reward[1]} with r=1; branches={self.branches}, "
            f"verified_only={self.verified_only}, correct_share={self.correct_share}). Raise num_questions or "
            f"num_revisions, or take a stronger model; all counts are in {self.out / 'statistics.json'}"
        )

    def _max_model_len(self, builder: PromptBuilder, questions: Sequence[Question]) -> int:
        longest = max(len(builder.prompt(q).token_ids) for q in questions)
        needed = longest + 2 * self.sampling.max_new_tokens + max(len(builder.bridge(r)) for r in (0, 1))
        available = getattr(self.student.hf_config(), "max_position_embeddings", None) or needed
        if needed > available:
            raise ValueError(
                f"sampling.max_new_tokens={self.sampling.max_new_tokens}: the longest prompt ({longest}) with an "
                f"answer, P_r and a revision needs {needed} tokens, but the model has {available} positions"
            )
        return needed

    def _pairs(self, job: _Job, chunk: int) -> list[tuple[ScoredRollout, list[ScoredRollout]]]:
        """First attempts of one chunk of questions with their revisions; from the journal where they are there.

        None on a rank that does not lead its engine, which takes part in its calls.
        """
        asked = job.questions[chunk * self.call_size : (chunk + 1) * self.call_size] if job.ranks.leads else []
        prompts = [job.builder.prompt(q) for q in asked for _ in range(self.num_initial)]
        initial = job.sample(prompts, self.sampling, f"{chunk:05d}-initial")
        # revisions of one answer stand side by side, so that the engine shares their prefix
        revision_prompts = [job.builder.revision_prompt(s) for s in initial for _ in range(self.num_revisions)]
        revised = job.sample(revision_prompts, self.sampling, f"{chunk:05d}-revision")
        n = self.num_revisions
        return [(first, revised[i * n : (i + 1) * n]) for i, first in enumerate(initial)]

    def _ask_all(self, job: _Job) -> tuple[Counter[str], list[tuple[int, int, int, int]]]:
        """Counts of everything sampled, and (chunk, attempt, revision, r) of every trace that may be kept.

        Collective; what all ranks sampled is told to each.
        """
        from tqdm import tqdm

        counts: Counter[str] = Counter()
        kept, ranks = [], job.ranks
        mine = [chunk for chunk in range(_num_chunks(job.questions, self.call_size)) if ranks.takes(chunk)]
        name = "collect" if ranks.world_size == 1 else f"collect, the first of {ranks.world_size} ranks"
        for chunk in tqdm(mine, desc=name, unit="chunk", disable=not ranks.is_first):
            for i, (first, revisions) in enumerate(self._pairs(job, chunk)):
                reward = first.verdict.reward
                _count(counts, "initial", first)
                for j, revision in enumerate(revisions):
                    _count(counts, f"revision_r{reward}", revision)
                    if self._keeps(first, revision):
                        kept.append((chunk, i, j, reward))
        everyones = ranks.gather((counts, kept))
        return sum((c for c, _ in everyones), Counter()), [key for _, keys in everyones for key in keys]

    def _keeps(self, first: ScoredRollout, revision: ScoredRollout) -> bool:
        finished = revision.rollout.finish_reason == "stop"  # a cut revision is never a trace
        right_branch = self.branches == "both" or not first.verdict.reward
        return finished and right_branch and (bool(revision.verdict.reward) or not self.verified_only)

    def _draw(self, kept: list[tuple[int, int, int, int]]) -> set[tuple[int, int, int, int]]:
        shuffled = sorted(kept)
        random.Random(derive_seed(run_seed(), "draw traces")).shuffle(shuffled)
        if self.num_traces is None and self.correct_share is None:
            return set(shuffled)
        num = len(shuffled) if self.num_traces is None else self.num_traces
        if self.correct_share is None:
            return set(shuffled[:num])
        by_reward = {r: [k for k in shuffled if k[3] == r] for r in (0, 1)}
        shares = {1: self.correct_share, 0: 1 - self.correct_share}
        # the scarcer branch decides how many traces there can be at the wanted shares
        num = int(min([num, *(len(by_reward[r]) / share for r, share in shares.items() if share)]))
        num_correct = round(num * self.correct_share)
        return {*by_reward[1][:num_correct], *by_reward[0][: num - num_correct]}

    def _chosen_traces(self, job: _Job, chosen: set[Any]) -> Iterator[Trace]:
        """In the order of the questions, on the first rank; the others hand theirs to it and yield none. Collective."""
        for chunk in range(_num_chunks(job.questions, self.call_size)):
            pairs = self._pairs(job, chunk) if job.ranks.takes(chunk) else []
            traces = [
                job.builder.trace(first, revision.rollout.token_ids)
                for i, (first, revisions) in enumerate(pairs)
                for j, revision in enumerate(revisions)
                if (chunk, i, j, first.verdict.reward) in chosen
            ]
            yield from job.ranks.to_first(traces, job.ranks.leader(chunk))


def _num_chunks(questions: Sequence[Question], size: int) -> int:
    return -(-len(questions) // size)


def _count(counts: Counter[str], kind: str, scored: ScoredRollout) -> None:
    counts[f"{kind}/generations"] += 1
    counts[f"{kind}/tokens"] += len(scored.rollout.token_ids)
    counts[f"{kind}/{scored.verdict.reason}"] += 1


def _statistics(counts: Counter[str], kept: Sequence[Any], chosen: set[Any], num_engine_calls: int) -> dict[str, Any]:
    """Rates by branch and reason, lengths, the shares of r=1 before and after the draw, and the budget."""
    kinds: dict[str, dict[str, float]] = {}
    for kind in ("initial", "revision_r0", "revision_r1"):
        total = counts[f"{kind}/generations"]
        reasons = {k.split("/")[1]: n for k, n in sorted(counts.items()) if k.startswith(f"{kind}/")}
        reasons.pop("generations", None)
        mean_tokens = reasons.pop("tokens", 0) / max(total, 1)
        rates = {f"rate_{reason}": n / total for reason, n in reasons.items()}
        kinds[kind] = {"generations": total, "mean_tokens": mean_tokens, **rates}
    return {
        **kinds,
        "candidate_traces": len(kept),
        "candidate_correct_share": sum(k[3] for k in kept) / max(len(kept), 1),
        "traces": len(chosen),
        "correct_share": sum(k[3] for k in chosen) / max(len(chosen), 1),
        "num_generations": sum(n for k, n in counts.items() if k.endswith("/generations")),
        "num_tokens_sampled": sum(n for k, n in counts.items() if k.endswith("/tokens")),
        "engine_calls": num_engine_calls,
    }
