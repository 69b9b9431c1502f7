"""Sampling of the data modules: evaluation, phase 2's rollouts, and the checks after a sync."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdzero.data import Evaluation, EvaluationDataModule, RolloutDataModule, TraceDataModule, TraceFile
from sdzero.data.base import StepDataModule
from sdzero.data.policy_sampler import NUM_CHECKED
from sdzero.data.trace_file import write_traces
from sdzero.engines.base import EngineError
from sdzero.prompts import PromptBuilder
from sdzero.types import EvalBatch, Prompt, Question, Rollout, Sampling, Split
from support.helpers import Notes, Toy, make_trace

SAMPLING = Sampling(max_new_tokens=20)


class Policy:
    """A policy without weights; its log-probabilities are `logprob`, the scripted engine's are 0."""

    student_config = SimpleNamespace(path="")
    hf_config = SimpleNamespace(max_position_embeddings=512)

    def __init__(self, builder: PromptBuilder, logprob: float = 0.0) -> None:
        self.builder, self.logprob, self.policy_version = builder, logprob, 0
        self.num_scored: list[int] = []

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter([("weight", torch.full((1,), float(self.policy_version)))])

    def policy_logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        self.num_scored.append(len(rollouts))
        return [torch.full((len(rollout.token_ids),), self.logprob) for rollout in rollouts]

    def max_extra_tokens(self, max_new_tokens: int) -> int:
        return max_new_tokens + 30


def answer(prompt: Prompt, seed: int) -> str:
    return f"={prompt.question.answer}" if seed % 2 else "=x"


Data = Callable[..., Any]


def attach_trainer(
    data: StepDataModule, policy: Policy, folder: Path, stage: str = "fit", rank: int = 0, world_size: int = 1
) -> Any:
    """Attach what data modules need of a trainer, and set up for a stage."""
    trainer = SimpleNamespace(
        global_rank=rank,
        is_global_zero=rank == 0,
        world_size=world_size,
        strategy=SimpleNamespace(root_device="cpu", reduce=lambda tensor, **_: tensor),
        lightning_module=policy,
        default_root_dir=str(folder),
    )
    data.trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
    data.setup(stage)
    return data


@pytest.fixture
def attach(builder: PromptBuilder, tmp_path: Path) -> Data:
    def attach(data: StepDataModule, *where: Any, logprob: float = 0.0, **options: Any) -> Any:
        return attach_trainer(data, Policy(builder, logprob), tmp_path, *where, **options)

    return attach


def evaluation(num_questions: int, num_samples: int = 2, call_size: int = 4) -> EvaluationDataModule:
    settings = Evaluation("eval", num_questions, num_samples, SAMPLING, call_size)
    return EvaluationDataModule(Toy(), Notes(answer), settings)


def phase2(num_questions: int = 5, **options: Any) -> RolloutDataModule:
    defaults: dict[str, Any] = {"prompts_per_step": 2, "sampling": SAMPLING, "call_size": 3}
    return RolloutDataModule(Toy(), Notes(answer), num_questions, **{**defaults, **options})


# --- evaluation -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(num=st.integers(1, 14), k=st.integers(1, 4), call_size=st.integers(1, 12), world_size=st.integers(1, 4))
def test_all_ranks_make_as_many_calls_and_each_question_is_sampled_once(
    builder: PromptBuilder, tmp_path_factory: pytest.TempPathFactory, num: int, k: int, call_size: int, world_size: int
) -> None:
    sampled: list[str] = []
    lengths = set()
    for rank in range(world_size):
        data: Any = evaluation(num, k, call_size)
        attach_trainer(data, Policy(builder), tmp_path_factory.mktemp("rank"), "test", rank, world_size)
        loader = data.test_dataloader()
        batches: list[EvalBatch] = list(loader)
        assert len(batches) == len(loader)
        # every batch syncs and compares log-probabilities, which all ranks must do together
        lengths.add((len(batches), len(data.policy.num_scored)))
        groups = [group for batch in batches for group in batch.groups]
        assert all(len(group) == k and len({s.rollout.prompt.question.id for s in group}) == 1 for group in groups)
        assert all(len(prompts) <= max(call_size, k) for _, prompts in data.engine.calls)
        sampled += [group[0].rollout.prompt.question.id for group in groups]
    assert sorted(sampled) == sorted(f"eval-{i}" for i in range(num))
    assert len(lengths) == 1


def test_a_restarted_evaluation_samples_nothing_twice(attach: Data) -> None:
    before = list(attach(evaluation(7), "test").test_dataloader())
    data = attach(evaluation(7), "test")
    again = list(data.val_dataloader())
    assert [batch.groups for batch in again] == [batch.groups for batch in before]
    assert not data.engine.calls and len(before) == 4


def test_training_without_evaluation_needs_no_task(attach: Data, builder: PromptBuilder, tmp_path: Path) -> None:
    write_traces(tmp_path / "traces.jsonl", [make_trace(builder, "q", "1+1=3", "1+1=2", 0)])
    data = attach(TraceDataModule(TraceFile(tmp_path / "traces.jsonl")))
    assert data.val_dataloader() == [] and data.steps_per_epoch == 1
    for stage in ("validate", "test", "predict"):
        with pytest.raises(ValueError, match=r"evaluation needs data\.task, data\.engine"):
            data.setup(stage)


# --- phase 2 --------------------------------------------------------------------------------------


def test_a_step_is_sampled_from_the_policy_of_that_step(attach: Data) -> None:
    data = attach(phase2(rollouts_per_prompt=2))
    versions, questions = [], []
    for version, batch in enumerate(data.train_dataloader()):
        assert batch.policy_version == version == batch.counter
        versions += [call[0] for call in data.engine.calls[len(versions) :]]
        questions.append([s.rollout.prompt.question.id for s in batch.scored])
        assert float(data.engine.weights["weight"]) == version
        data.policy.policy_version += 1
    assert [len(step) for step in questions] == [4, 4, 2], "the last step of five questions by two is short"
    assert versions == [0, 0, 1, 1, 2] and len({id for step in questions for id in step}) == 5
    assert all(step[::2] == step[1::2] for step in questions)


def test_a_step_of_a_rank_without_questions_is_empty(attach: Data) -> None:
    """Three ranks share steps of two questions; the third still syncs and compares with the others."""
    data = attach(phase2(num_questions=2), rank=2, world_size=3)
    (batch,) = data.train_dataloader()
    assert batch.scored == [] and data.policy.num_scored == [0] and data.engine.num_syncs == 1


def test_a_restarted_step_samples_nothing_twice(attach: Data) -> None:
    first, data = next(iter(attach(phase2()).train_dataloader())), attach(phase2())
    assert next(iter(data.train_dataloader())).scored == first.scored and not data.engine.calls


def test_calls_are_kept_until_two_checkpoints_are_past_them(attach: Data, tmp_path: Path) -> None:
    """Files saved at the same step count as one checkpoint."""
    data = attach(phase2(num_questions=10, call_size=9))
    journal = tmp_path / "journal/rank0"
    for step, _ in enumerate(data.train_dataloader()):
        kept = sorted(file.stem for file in journal.glob("*.jsonl"))
        assert kept == [f"train-{n:06d}" for n in range(max(0, step - 1), step + 1)]
        for _ in range(3):
            assert data.state_dict() == {"counter": step + 1}
        data.policy.policy_version += 1


def test_phases_share_no_question(attach: Data, tmp_path: Path) -> None:
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(["phase1-0", "phase2-3"]))
    with pytest.raises(ValueError, match=r"1 questions of phase 2 are also in phase 1 .*\['phase2-3'\]"):
        attach(phase2(disjoint_from=file))
    attach(phase2(num_questions=3, disjoint_from=file))
    file.write_text(json.dumps(["phase1-0"])[:-1])
    with pytest.raises(ValueError, match=r"disjoint_from: .*questions\.json is damaged .*`sdzero collect`"):
        attach(phase2(num_questions=3, disjoint_from=file))


def test_a_stage_writes_its_questions(attach: Data, tmp_path: Path) -> None:
    class Held(Toy):
        def questions(self, split: Split, num_questions: int | None) -> list[Question]:
            return [replace(question, family="twins") for question in super().questions(split, num_questions)]

        def exclusions(self) -> dict[str, Any]:
            return {"set_aside": {"a rule": 3}}

    data = phase2(evaluation=Evaluation("eval", 2, 1, SAMPLING))
    attach(data)
    written = json.loads((tmp_path / "questions-fit.json").read_text())
    assert written == {"train": [f"phase2-{i}" for i in range(5)], "eval": ["eval-0", "eval-1"], "left_out": {}}
    attach(EvaluationDataModule(Held(), Notes(answer), Evaluation("eval", 2, 1, SAMPLING)), "test")
    written = json.loads((tmp_path / "questions-test.json").read_text())
    assert written == {"train": [], "eval": ["twins"], "left_out": {"set_aside": {"a rule": 3}}}
    (tmp_path / "questions-fit.json").unlink()
    attach(phase2(), rank=1, world_size=2)
    assert not (tmp_path / "questions-fit.json").exists(), "rank 0 writes"


# --- lengths --------------------------------------------------------------------------------------


def test_the_engines_limit_is_derived(attach: Data, builder: PromptBuilder) -> None:
    prompt = len(builder.prompt(Toy().questions("eval", 1)[0]).token_ids)
    bridge = max(len(builder.bridge(r)) for r in (0, 1))
    assert attach(evaluation(3), "test").max_model_len() == prompt + 2 * 20 + bridge, "an answer may be revised"
    assert attach(phase2()).max_model_len() == prompt + 20
    wide = Evaluation("eval", 3, 2, Sampling(max_new_tokens=400))
    assert attach(EvaluationDataModule(Toy(), Notes(answer), wide), "test").max_model_len() == 512, "the model's limit"


@pytest.mark.parametrize("over", [0, 1])
def test_the_teachers_context_must_fit(attach: Data, builder: PromptBuilder, over: int) -> None:
    prompt = len(builder.prompt(Toy().questions("phase2", 1)[0]).token_ids)
    most = (512 - prompt - 30) // 2 + over
    data = phase2(sampling=Sampling(max_new_tokens=most))
    if not over:
        attach(data)
        return
    with pytest.raises(ValueError, match=rf"sampling\.max_new_tokens \({most}\).*the model has 512 positions"):
        attach(data)


# --- the engine after a sync ----------------------------------------------------------------------


def test_log_probabilities_are_compared_once_for_every_sync(attach: Data) -> None:
    data = attach(phase2(num_questions=9, prompts_per_step=9, call_size=2), logprob=0.25)
    first, stats = data.sample([data.policy.builder.prompt(q) for q in data.questions], SAMPLING, "a", 2)
    assert stats["logprob_gap"] == pytest.approx(0.25) and stats["sync_seconds"] > 0 and "generate_seconds" in stats
    assert data.policy.num_scored == [NUM_CHECKED]
    _, stats = data.sample([first[0].rollout.prompt], SAMPLING, "b", 2)
    assert stats["logprob_gap"] == pytest.approx(0.25) and stats["sync_seconds"] == 0  # every step has a point
    data.policy.policy_version = 1
    assert data.sample([first[0].rollout.prompt], SAMPLING, "c", 2)[1]["sync_seconds"] > 0
    data.engine.policy_version = None  # its weights are gone, e.g. after a sleep
    assert data.sample([first[0].rollout.prompt], SAMPLING, "d", 2)[1]["sync_seconds"] > 0
    assert data.policy.num_scored == [NUM_CHECKED, 1, 1]


@pytest.mark.parametrize("logprob", [0.31, float("nan"), float("-inf")])
def test_an_engine_with_other_weights_stops_the_run(attach: Data, logprob: float) -> None:
    data = attach(phase2(), logprob=logprob)
    with pytest.raises(EngineError, match=r"max_logprob_gap=0\.3\): stale or garbled weights"):
        next(iter(data.train_dataloader()))


def test_ranks_of_one_engine_agree_on_every_call_and_others_on_all_of_them(attach: Data) -> None:
    reduced: list[tuple[int, str]] = []

    def reduce(tensor: Tensor, reduce_op: str) -> Tensor:
        reduced.append((int(tensor), reduce_op))
        return tensor

    for size, expected in ((1, [0]), (2, [2, 1, 0, 1, 0, 0])):
        reduced.clear()
        data = attach(phase2(num_questions=6, prompts_per_step=6, call_size=3))
        data.engine.tensor_parallel_size = size
        data.trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce)
        data.trainer.default_root_dir += str(size)
        next(iter(data.train_dataloader()))
        # number of calls; for each, whether to make it and whether the engine died; the same for all of them
        assert reduced == [(value, "max") for value in expected]


def test_an_engine_is_started_on_first_use_warmed_up_once_and_closed(
    attach: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for name in ("start", "sync", "warm_up", "close"):
        plain = getattr(Notes, name)

        def noted(self: Notes, *arguments: Any, name: str = name, plain: Any = plain) -> Any:
            events.append(name)
            time.sleep(0.002 * (name == "warm_up"))
            return plain(self, *arguments)

        monkeypatch.setattr(Notes, name, noted)
    data = attach(phase2())
    data.teardown("fit")
    assert events == []
    steps, metrics = iter(data.train_dataloader()), []
    for version in range(3):
        data.policy.policy_version = version
        metrics.append(next(steps).stats["warmup_seconds"])
    data.teardown("fit")
    data.teardown("fit")
    assert events == ["start", "sync", "warm_up", "sync", "sync", "close"], "the warm-up needs weights"
    assert metrics[0] >= 0.002 and metrics[1:] == [0.0, 0.0]
    data.sampler.sync()
    assert events[-3:] == ["start", "sync", "warm_up"], "another engine is cold"
