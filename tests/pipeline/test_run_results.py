"""Files that a run leaves: lineage, and a summary that equals an independent recount of its journals."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdzero.data import TraceDataModule, TraceFile
from sdzero.data.trace_file import read_traces
from sdzero.evaluation.keywords import count_keywords
from sdzero.models.weights import folder_sha256
from sdzero.pipeline.stages import list_stages
from sdzero.tasks import Chains
from sdzero.utils.recipe import load_recipe
from support.runs import MODELS, SMOKE, STAGES, num_calls, read_json, records, responses, scalars

# a validation is two calls: answers, and revisions of them
CALLS = {"collect": 8, "srt": 2 * 2, "self_distill": 5 + 2, "base/eval": 4, "srt/eval": 4, "self_distill/eval": 4}


def test_lineage_has_config_versions_and_hashes(smoke_run: Path) -> None:
    lineage = records(smoke_run)
    stages = {stage.name: stage for stage in list_stages(load_recipe(SMOKE), smoke_run)}
    assert list(lineage) == list(stages) == list(STAGES)
    for name, record in lineage.items():
        assert record["config"] == stages[name].identity()
        assert record["versions"]["torch"] == version("torch") and record["versions"]["sdzero"]
        assert {"lightning", "transformers", "python"} <= record["versions"].keys()
        assert 0 < record["seconds"] < 3600

    def sha256(path: str) -> str:
        return hashlib.sha256((smoke_run / path).read_bytes()).hexdigest()

    for name in MODELS:
        weights = folder_sha256(smoke_run / name / "model")
        questions = sha256(f"{name}/questions-fit.json")
        assert lineage[name]["outputs"] == {"model": weights, "questions-fit.json": questions}
        assert lineage[f"{name}/eval"]["inputs"] == {"model.init_args.student.path": weights}
        files = ("results.json", "rewards.json", "questions-test.json")
        assert lineage[f"{name}/eval"]["outputs"] == {file: sha256(f"{name}/eval/{file}") for file in files}
    traces, questions = sha256("collect/traces.jsonl"), sha256("collect/questions.json")
    assert lineage["collect"]["inputs"] == {"student.path": lineage["base"]["outputs"]["model"]}
    assert lineage["collect"]["outputs"].items() >= {"traces.jsonl": traces, "questions.json": questions}.items()
    assert set(lineage["srt"]["inputs"].values()) == {traces, lineage["base"]["outputs"]["model"]}
    assert set(lineage["self_distill"]["inputs"].values()) == {questions, lineage["srt"]["outputs"]["model"]}


def test_the_summary_equals_a_recount_of_the_evaluations(smoke_run: Path) -> None:
    summary = read_json(smoke_run / "summary.json")
    assert [row["stage"] for row in summary] == list(MODELS)
    task = Chains(min_ops=1, max_ops=2)
    questions = {q.id: q for q in task.questions("eval", 16)}

    def right(response: dict[str, Any]) -> bool:
        finished = response["finish_reason"] == "stop"
        return finished and bool(task.verify(questions[response["question"]], response["text"]).reward)

    for row in summary:
        journal = smoke_run / row["stage"] / "eval/journal/rank0"
        answers = responses(journal, "eval")
        by_question: dict[str, list[bool]] = defaultdict(list)
        for answer in answers:
            by_question[answer["question"]].append(right(answer))
        assert by_question.keys() == questions.keys() and {len(r) for r in by_question.values()} == {8}
        means = [sum(rewards) / 8 for rewards in by_question.values()]
        mean = sum(means) / 16
        error = math.sqrt(sum((m - mean) ** 2 for m in means) / 15 / 16)
        assert row["accuracy"] == pytest.approx(mean, abs=1e-12)
        assert row["accuracy_se"] == pytest.approx(error, abs=1e-7)
        assert row["pass_at_8"] == pytest.approx(sum(any(r) for r in by_question.values()) / 16)
        assert row["mean_response_tokens"] == pytest.approx(sum(len(a["token_ids"]) for a in answers) / 128)
        assert row["keyword_rate"] == pytest.approx(sum(count_keywords(a["text"]) for a in answers) / 128)
        flips = [(by_question[r["question"]][0], right(r)) for r in responses(journal, "revise")]
        assert len(flips) == 16
        assert row["wrong_to_right"] == flips.count((False, True))
        assert row["right_to_wrong"] == flips.count((True, False))
        assert row["weights_sha256"] == folder_sha256(smoke_run / row["stage"] / "model")
    assert any(row["accuracy"] for row in summary), "a run without a right answer proves little"


def test_budgets_equal_the_cost_of_training_each_model(smoke_run: Path) -> None:
    base, srt, self_distill = read_json(smoke_run / "summary.json")
    names = ("num_generations", "num_tokens_sampled", "num_tokens_trained")
    assert [base[name] for name in names] == [0, 0, 0]

    sampled = responses(smoke_run / "collect/journal", "")
    assert srt["num_generations"] == len(sampled) == 64 * (1 + 3)
    assert srt["num_tokens_sampled"] == sum(len(response["token_ids"]) for response in sampled)
    traces = TraceDataModule(TraceFile(smoke_run / "collect/traces.jsonl"), traces_per_step=16)
    traces.traces = read_traces(smoke_run / "collect/traces.jsonl")
    traces.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=None)  # pyright: ignore[reportAttributeAccessIssue]
    trained = [traces.traces[i] for step in range(6) for i in traces.indices(step)]
    revised = sum(len(t.revised_ids) for t in trained)
    generated = revised + sum(len(t.init_ids) + len(t.bridge_ids) for t in trained)
    assert srt["num_tokens_trained"] == generated + revised

    (lengths,) = scalars(smoke_run / "self_distill", "rollout/length")
    assert self_distill["num_generations"] == 5 * 16
    assert self_distill["num_tokens_sampled"] == pytest.approx(sum(16 * mean for _, mean in lengths))
    assert self_distill["num_tokens_trained"] == 2 * self_distill["num_tokens_sampled"]

    assert num_calls(smoke_run) == sum(CALLS.values())
    lineage = records(smoke_run)
    seconds = sum(lineage[name]["seconds"] for name in ("collect", "srt", "srt/eval"))
    assert srt["seconds"] == pytest.approx(seconds)


def test_the_teacher_was_synchronised_after_the_first_epoch(smoke_run: Path) -> None:
    (generation,) = scalars(smoke_run / "self_distill", "teacher/generation")
    assert [value for _, value in generation] == [0, 0, 1, 1, 1]
