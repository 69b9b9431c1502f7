"""Phase 1 data (section 2.1, appendix C.1): sample, verify, sample a revision, verify, keep.

Without revisions the verified answers themselves are the traces (rejection sampling, RFT).

OUT holds traces.jsonl (D_revision), questions.json (identities of all questions) and statistics.json. An interrupted
collection resumes from the finished generate calls in OUT/journal.

On several devices each engine makes the calls of its share of the questions. A call does not depend on the number of
engines, so D_revision is the same, and a collection may resume on another number of devices.
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

from sdzero.data.journal import CallJournal
from sdzero.data.launch import Ranks, launch
from sdzero.data.policy_sampler import PolicySampler
from sdzero.data.sampler import Sampler
from sdzero.data.trace_choice import TraceKey, choose_answers, choose_traces
from sdzero.data.trace_file import write_traces
from sdzero.engines.base import EngineSpec, RolloutEngine
from sdzero.models.language_model import ModelConfig, max_positions
from sdzero.models.weights import folder_sha256
from sdzero.prompts import PromptBuilder
from sdzero.tasks.base import Task
from sdzero.types import Question, Sampling, ScoredRollout, Split, TokenIds, Trace
from sdzero.utils.files import write_text
from sdzero.utils.seeds import derive_seed, run_seed

log = logging.getLogger(__name__)


@dataclass
class Collect:
    """Samples first attempts and revisions of phase 1's questions and writes D_revision.

    Args:
        student: the model that is sampled from.
        task: questions and verifier.
        engine: rollout engine.
        out: folder to write.
        num_questions: number of questions, all of which are sampled before traces are chosen.
        split: split of the task.
        num_initial: number of first attempts per question.
        num_revisions: number of revisions per first attempt. 0: the first attempts are kept, as demonstrations (RFT):
            of identical ones of a question one, and of each question one before any second.
        num_traces: number of traces, chosen at random from the verified ones; null keeps all.
        correct_share: fraction of the chosen traces with a correct first attempt (r=1); null leaves it to chance.
        branches: `both`, or `incorrect` to keep only traces whose first attempt was wrong.
        verified_only: keep only verified-correct revisions; false is the ablation of table 15.
        sampling: sampling parameters.
        call_size: responses per generate call; part of the run's identity.
        engine_dtype: dtype of the engine's weights, `float32` or `bfloat16`.
        devices: number of processes on each node, one per GPU; `auto` takes all visible GPUs, or one process.
        num_nodes: number of nodes; several need a launcher such as torchrun or srun.
        max_engine_restarts: maximum number of restarts of an engine that crashed, timed out or returned garbage. vLLM
            on several devices is not restarted: the collection stops, and resumes when it is started again.
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
        for name, least in (("num_questions", 1), ("num_initial", 1), ("num_revisions", 0), ("call_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.num_revisions and (self.correct_share is not None or self.branches != "both"):
            raise ValueError("correct_share and branches select revisions, of which num_revisions=0 samples none")
        if self.num_traces is not None and self.num_traces < 1:
            raise ValueError(f"num_traces must be at least 1, or null to keep all, got {self.num_traces}")
        if self.num_nodes < 1 or (self.devices != "auto" and self.devices < 1):
            raise ValueError(f"devices and num_nodes must be at least 1, got {self.devices} and {self.num_nodes}")
        if self.correct_share is not None and not 0 <= self.correct_share <= 1:
            raise ValueError(f"correct_share must lie in [0, 1], got {self.correct_share}")

    def run(self) -> None:
        """Sample, choose and write.

        Raises:
            ValueError: no trace is left; gives the counts that explain it.
        """
        builder = self.student.builder()
        questions = self.task.questions(self.split, self.num_questions)
        spec = EngineSpec(self.student.path, self._max_model_len(builder, questions), self.engine_dtype, True)
        ranks = launch(self.devices, self.num_nodes, getattr(self.engine, "tensor_parallel_size", 1))
        self.out.mkdir(parents=True, exist_ok=True)
        sampler = self._sampler(spec, builder, ranks)
        chunks = _Chunks(self, sampler, questions, ranks)
        try:
            sampler.start()
            chunks.warn_if_idle()
            counts, kept = self._sample_all(chunks)
            rng = random.Random(derive_seed(run_seed(), "draw traces"))  # the same on all ranks
            if self.num_revisions:
                chosen = choose_traces(kept, self.num_traces, self.correct_share, rng)
            else:
                chosen = choose_answers(kept, self.num_traces, self.num_initial, rng)
            traces = self._chosen_traces(chunks, chosen)
            if ranks.is_first:
                write_traces(self.out / "traces.jsonl", traces)
            else:
                deque(traces, 0)
        finally:
            self.engine.close()
        if ranks.is_first:
            write_text(self.out / "questions.json", json.dumps([q.identity for q in questions]))
            self._write_statistics(counts, kept, chosen, sampler.sampler.journal.num_started)

    def _sampler(self, spec: EngineSpec, builder: PromptBuilder, ranks: Ranks) -> PolicySampler:
        weights = folder_sha256(Path(self.student.path)) if Path(self.student.path).is_dir() else self.student.path
        folder = self.out / "journal"
        calls = Sampler(
            self.engine,
            self.task,
            # ranks that are not the leader of their engine make its calls without prompts
            CallJournal(folder, ranks.rank) if ranks.is_leader else CallJournal(folder / f"rank{ranks.rank}"),
            self.call_size,
            run_seed(),
            weights=f"{weights}/{self.engine_dtype}",
            all_reduce_max=ranks.all_reduce_max,
        )
        # a collective start would wait for ranks that are in calls of their own
        max_restarts = None if ranks.world_size > 1 and self.engine.starts_collectively else self.max_engine_restarts
        return PolicySampler(calls, spec, builder, max_restarts=max_restarts, all_reduce_max=ranks.all_reduce_max)

    def _write_statistics(
        self, counts: Counter[str], kept: Sequence[TraceKey], chosen: set[TraceKey], num_engine_calls: int
    ) -> None:
        statistics = {**_statistics(counts, kept, chosen, num_engine_calls), "left_out": self.task.exclusions()}
        if not self.num_revisions:
            statistics["duplicates"] = counts["duplicates"]
        text = json.dumps(statistics, indent=2)
        write_text(self.out / "statistics.json", f"{text}\n")
        print(text, flush=True)
        if not chosen:
            kinds = ("revision_r0", "revision_r1") if self.num_revisions else ("initial",)
            what = "revisions" if self.num_revisions else "answers"
            num, correct = (sum(counts[f"{kind}/{name}"] for kind in kinds) for name in ("generations", "correct"))
            wrong_first, right_first = (sum(k[3] == r for k in kept) for r in (0, 1))
            raise ValueError(
                f"no trace was left: of {num} {what} {correct} were verified as correct, and {len(kept)} "
                f"could be kept ({wrong_first} with r=0, {right_first} with r=1; branches={self.branches}, "
                f"verified_only={self.verified_only}, correct_share={self.correct_share}). Raise num_questions or "
                f"num_revisions, or use a stronger model; all counts are in {self.out / 'statistics.json'}"
            )
        if self.num_traces is not None and len(chosen) < self.num_traces:
            log.warning("num_traces: %d requested, only %d available", self.num_traces, len(chosen))

    def _max_model_len(self, builder: PromptBuilder, questions: Sequence[Question]) -> int:
        longest = builder.max_prompt_len(questions)
        needed, extra = longest + self.sampling.max_new_tokens, ""
        if self.num_revisions:
            extra = ", P_r and a revision"
            needed += builder.max_bridge_len + self.sampling.max_new_tokens
        available = max_positions(self.student.hf_config())
        if needed > available:
            raise ValueError(
                f"sampling.max_new_tokens={self.sampling.max_new_tokens}: the longest prompt ({longest}) with an "
                f"answer{extra} needs {needed} tokens, but the model has {available} positions"
            )
        return needed

    def _sample_all(self, chunks: _Chunks) -> tuple[Counter[str], list[TraceKey]]:
        """Return counts of all samples, and the keys of all traces that may be kept. Collective; the same on all
        ranks."""
        from tqdm import tqdm

        counts: Counter[str] = Counter()
        kept, ranks = [], chunks.ranks
        name = "collect" if ranks.world_size == 1 else f"collect, the first of {ranks.world_size} ranks"
        own = [chunk for chunk in range(len(chunks)) if ranks.takes(chunk)]
        for chunk in tqdm(own, desc=name, unit="chunk", disable=not ranks.is_first):
            answers: set[tuple[str, TokenIds]] = set()
            for i, (first, revisions) in enumerate(chunks.sample(chunk)):
                reward = first.verdict.reward
                _count(counts, "initial", first)
                for j, revision in enumerate(revisions):
                    _count(counts, f"revision_r{reward}", revision)
                    if self._keeps(first, revision):
                        kept.append((chunk, i, j, reward))
                if not self.num_revisions and self._keeps(first, first):
                    answer = (first.rollout.prompt.question.id, first.rollout.token_ids)
                    if answer in answers:
                        counts["duplicates"] += 1
                    else:
                        kept.append((chunk, i, 0, reward))
                    answers.add(answer)
        gathered = ranks.gather((counts, kept))
        return sum((c for c, _ in gathered), Counter()), [key for _, keys in gathered for key in keys]

    def _keeps(self, first: ScoredRollout, revision: ScoredRollout) -> bool:
        finished = revision.rollout.finish_reason == "stop"  # a truncated revision is never a trace
        right_branch = self.branches == "both" or not first.verdict.reward
        return finished and right_branch and (bool(revision.verdict.reward) or not self.verified_only)

    def _chosen_traces(self, chunks: _Chunks, chosen: set[TraceKey]) -> Iterator[Trace]:
        """Yield traces in the order of the questions on the first rank; the others send theirs. Collective."""
        for chunk in range(len(chunks)):
            pairs = chunks.sample(chunk) if chunks.ranks.takes(chunk) else []
            builder = chunks.sampler.builder
            traces = [
                builder.trace(first, revision.rollout.token_ids) if self.num_revisions else builder.answer_trace(first)
                for i, (first, revisions) in enumerate(pairs)
                for j, revision in enumerate(revisions or [first])
                if (chunk, i, j, first.verdict.reward) in chosen
            ]
            yield from chunks.ranks.to_first(traces, chunks.ranks.leader(chunk))


@dataclass(frozen=True)
class _Chunks:
    """The questions of a collection in chunks of `call_size`, dealt out to the engines in turn."""

    collect: Collect
    sampler: PolicySampler
    questions: Sequence[Question]
    ranks: Ranks

    def __len__(self) -> int:
        return -(-len(self.questions) // self.collect.call_size)

    def sample(self, chunk: int) -> list[tuple[ScoredRollout, list[ScoredRollout]]]:
        """Return the first attempts of one chunk with their revisions; finished calls come from the journal.

        Empty on a rank that is not the leader of its engine, but takes part in its calls.
        """
        size, num_revisions = self.collect.call_size, self.collect.num_revisions
        builder = self.sampler.builder
        questions = self.questions[chunk * size : (chunk + 1) * size] if self.ranks.is_leader else []
        prompts = [builder.prompt(q) for q in questions for _ in range(self.collect.num_initial)]
        initial, _ = self.sampler.sample(prompts, self.collect.sampling, f"{chunk:05d}-initial", size)
        if not num_revisions:
            return [(s, []) for s in initial]
        # revisions of one response are adjacent, so that the engine shares their prefix
        revision_prompts = [builder.revision_prompt(s) for s in initial for _ in range(num_revisions)]
        revised, _ = self.sampler.sample(revision_prompts, self.collect.sampling, f"{chunk:05d}-revision", size)
        return [(s, revised[i * num_revisions : (i + 1) * num_revisions]) for i, s in enumerate(initial)]

    def warn_if_idle(self) -> None:
        num_engines = self.ranks.num_engines
        if self.ranks.is_first and len(self) < num_engines:
            log.warning(
                "call_size: %d questions are %d chunks of at most %d, so %d of %d engines have nothing to do",
                *(len(self.questions), len(self), self.collect.call_size, num_engines - len(self), num_engines),
            )


def _count(counts: Counter[str], kind: str, scored: ScoredRollout) -> None:
    counts[f"{kind}/generations"] += 1
    counts[f"{kind}/tokens"] += len(scored.rollout.token_ids)
    counts[f"{kind}/{scored.verdict.reason}"] += 1


def _statistics(
    counts: Counter[str], kept: Sequence[TraceKey], chosen: set[TraceKey], num_engine_calls: int
) -> dict[str, Any]:
    """Compute rates by branch and reason, lengths, fractions of r=1 before and after the choice, and the budget."""
    kinds: dict[str, dict[str, float]] = {}
    for kind in ("initial", "revision_r0", "revision_r1"):
        reasons = {k.split("/")[1]: n for k, n in sorted(counts.items()) if k.startswith(f"{kind}/")}
        total, num_tokens = reasons.pop("generations", 0), reasons.pop("tokens", 0)
        rates = {f"rate_{reason}": n / total for reason, n in reasons.items()}
        kinds[kind] = {"generations": total, "mean_tokens": num_tokens / max(total, 1), **rates}
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
