"""The smoke recipe's second phase on its base, with vLLM instead of the recipe's engine."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import yaml

from support.runs import SMOKE, num_calls, once, read_json, records, responses, scalars, sdzero, write_records

VLLM = "sdzero.engines.VLLMEngine"
STAGES = ("base", "base/eval", "self_distill", "self_distill/eval")


@pytest.fixture(scope="module")
def out(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the recipe; the base, which samples nothing, is the smoke run's and counts as finished."""

    def make(out: Path) -> None:
        shutil.copytree(smoke_run / "base", out / "base", ignore=shutil.ignore_patterns("eval"))
        shutil.copy(smoke_run / "lineage.json", out)
        write_records(out, {"base": records(out)["base"]})
        overlay = out.with_name("phase2_only")
        overlay.mkdir()
        stages = {"base": None, "self_distill": {"label": "SD-Zero"}}
        (overlay / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages}))
        done = sdzero("run", SMOKE, "--out", out, "--engine", "vllm", "--overlay", overlay)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "It is recommended" not in done.stderr, "Lightning's advice for each metric"
        assert "[1/4] base: finished before" in done.stdout and done.stdout.count("finished before") == 1

    return once(tmp_path_factory, "vllm", make)


def test_every_stage_that_samples_used_vllm(out: Path) -> None:
    lineage = records(out)
    assert tuple(lineage) == STAGES
    for name in STAGES[1:]:
        assert lineage[name]["config"]["data.init_args.engine.class_path"] == VLLM, name
    saved = yaml.safe_load((out / "self_distill/config.yaml").read_text())
    assert saved["data"]["init_args"]["engine"]["class_path"] == VLLM
    assert num_calls(out) == 5 + 2 + 2 * 4  # steps, validation, evaluations
    finished = [r for r in responses(out / "base/eval/journal/rank0", "") if r["finish_reason"] == "stop"]
    assert len(finished) > 64 and all(any(r["logprobs"]) for r in finished), "sampled from a model"


def test_the_summary_has_its_metrics(out: Path, smoke_run: Path) -> None:
    summary, other = read_json(out / "summary.json"), read_json(smoke_run / "summary.json")
    assert [row["stage"] for row in summary] == ["base", "self_distill"]
    for row in summary:
        assert row.keys() == other[0].keys()
        assert 0 <= row["accuracy"] <= row["pass_at_8"] <= 1 and row["mean_response_tokens"] > 1
    budgets = [
        (row["num_generations"], row["num_tokens_sampled"] > 0, row["num_tokens_trained"] > 0) for row in summary
    ]
    assert budgets == [(0, False, False), (80, True, True)]
    assert len({row["weights_sha256"] for row in summary}) == 2
    assert summary[0]["weights_sha256"] == other[0]["weights_sha256"]


def test_the_engine_followed_the_student_and_the_teacher_was_synchronised(out: Path) -> None:
    """After every step the engine's log-probabilities are those of the new weights."""
    (gaps,) = scalars(out / "self_distill", "rollout/logprob_gap")
    assert [step for step, _ in gaps] == list(range(5))
    assert all(math.isfinite(gap) and 0 < gap < 1e-3 for _, gap in gaps)
    (generations,) = scalars(out / "self_distill", "teacher/generation")
    assert [value for _, value in generations] == [0, 0, 1, 1, 1]
