"""Command line: overrides set the keys they name, and every command runs on a run's models."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdzero.cli.main import COMMANDS, USAGE, _one_line
from sdzero.tasks import Chains
from support.runs import ROOT, SMOKE, exit_code, read_json, responses, rows, scalars


def flat(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


# --- fit ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overridden(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phase 2 with overrides in the short form, reading the folders of another run."""
    out = tmp_path_factory.mktemp("overridden")
    arguments = [
        *("--config", SMOKE / "self_distill.yaml"),
        f"--model.student.path={smoke_run}/srt/model",
        f"--data.disjoint_from={smoke_run}/collect/questions.json",
        f"--trainer.default_root_dir={out}",
        "--trainer.max_steps=3",
        "--model.divergence.kind=forward",
        "--model.divergence.top_k=4",
        "--data.prompts_per_step=8",
        "--data.call_size=5",
        "--trainer.enable_progress_bar=false",
    ]
    with pytest.MonkeyPatch.context() as patch:
        assert exit_code(patch, "fit", *arguments) == 0
    return out


def test_overrides_are_in_the_saved_config(overridden: Path, smoke_run: Path) -> None:
    saved = yaml.safe_load((overridden / "config.yaml").read_text())
    expected = {
        "trainer.max_steps": 3,
        "model.init_args.divergence.kind": "forward",
        "model.init_args.divergence.top_k": 4,
        "data.init_args.prompts_per_step": 8,
        "data.init_args.call_size": 5,
        "data.init_args.num_questions": 48,  # the recipe's value
    }
    assert {key: flat(saved, key) for key in expected} == expected


def test_overrides_take_effect(overridden: Path, smoke_run: Path) -> None:
    files = (overridden / "model/sdzero.json", smoke_run / "self_distill/model/sdzero.json")
    manifest, before = map(read_json, files)
    assert (manifest["policy_version"], before["policy_version"]) == (3, 5)
    assert manifest["num_generations"] == 3 * 8
    assert manifest["weights_sha256"] != before["weights_sha256"]
    calls = (overridden / "journal/rank0/calls.log").read_text().split()
    trained = [part for step in range(3) for call in "01" for part in (f"train-{step:06d}", call)]
    assert calls == [*trained, "eval-000003-00000", "0", "revise-000003-00000", "0"]
    assert len(responses(overridden / "journal/rank0", "train-000002")) == 8

    (mass,) = scalars(overridden, "teacher/top_k_mass")
    assert len(mass) == 3 and all(0.2 < value <= 1 for _, value in mass)
    assert scalars(smoke_run / "self_distill", "teacher/top_k_mass") == [[]], "not logged for the full vocabulary"


def test_the_saved_config_is_a_config(overridden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved config reproduces the run."""
    arguments = ("--config", overridden / "config.yaml", f"--trainer.default_root_dir={tmp_path}")
    assert exit_code(monkeypatch, "fit", *arguments) == 0
    first, again = (read_json(folder / "model/sdzero.json") for folder in (overridden, tmp_path))
    assert first["num_tokens_sampled"] == again["num_tokens_sampled"]


def test_the_schedule_steps_once_per_step(smoke_run: Path) -> None:
    (rates,) = scalars(smoke_run / "self_distill", "train/lr")
    assert [rate for _, rate in rates] == pytest.approx([0.0, 3e-4, 3e-4, 3e-4, 3e-4])


# --- validate, test, predict ----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_commands(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Seven questions in calls of two: the last call is short."""
    arguments = [
        *("--config", SMOKE / "eval.yaml", f"--model.student.path={smoke_run}/srt/model"),
        f"--trainer.default_root_dir={tmp_path}",
        *("--data.evaluation.num_questions=7", "--data.evaluation.num_samples=2", "--data.evaluation.call_size=4"),
    ]
    assert exit_code(monkeypatch, command, *arguments) == 0
    questions = {q.id: q for q in Chains(min_ops=1, max_ops=2).questions("eval", 7)}
    answers = responses(tmp_path / "journal/rank0", "eval")
    assert [a["question"] for a in answers] == [id for id in questions for _ in range(2)]
    gold = [f"A{questions[a['question']].answer}" for a in answers]
    right = [a["finish_reason"] == "stop" and a["text"].endswith(end) for a, end in zip(answers, gold, strict=True)]
    if command == "predict":
        predictions = rows(tmp_path / "predictions-rank0.jsonl")
        assert [p["question"] for p in predictions] == [a["question"] for a in answers]
        assert [p["response"] for p in predictions] == [a["text"] for a in answers]
        assert [p["reward"] for p in predictions] == right
        assert all((p["reason"] == "correct") == p["reward"] for p in predictions)
    if command == "test":
        results = read_json(tmp_path / "results.json")
        assert results["eval/avg_at_k"] == pytest.approx(sum(right) / 14)
        assert "eval/pass_at_2" in results and "eval/revise_acc2" in results
    assert not (tmp_path / "checkpoints").exists()


def test_a_metric_that_is_not_a_number_is_null(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question has no standard error, and JSON has no NaN."""
    arguments = ["--config", SMOKE / "eval.yaml", f"--model.student.path={smoke_run}/srt/model"]
    arguments += [f"--trainer.default_root_dir={tmp_path}", "--data.evaluation.num_questions=1"]
    assert exit_code(monkeypatch, "test", *arguments) == 0
    results = read_json(tmp_path / "results.json")
    assert results["eval/avg_at_k_se"] is None and 0 <= results["eval/avg_at_k"] <= 1
    assert "NaN" not in (tmp_path / "results.json").read_text()


# --- the rest -------------------------------------------------------------------------------------


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        assert exit_code(monkeypatch, *arguments) == 0
        assert capsys.readouterr().out.strip() == USAGE
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", USAGE), command
    assert "unknown command 'trian'" in str(exit_code(monkeypatch, "trian"))


@pytest.mark.parametrize("command", ["run", "collect", "fit", "test"])
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    assert exit_code(monkeypatch, command, "--help") in (0, None)
    assert "usage: sdzero" in capsys.readouterr().out


def test_the_dispatcher_imports_nothing_heavy_and_a_collection_no_lightning() -> None:
    """`sdzero --help`, `sdzero run --help` and an unknown command respond immediately."""
    code = """import sys, sdzero.cli.main, sdzero.pipeline.run
print({"torch", "lightning"} & {*sys.modules})
import sdzero.data.collect, sdzero.engines.transformers
print({"lightning"} & {*sys.modules})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["set()", "set()"]


def test_a_parsers_message_becomes_one_line() -> None:
    message = """Parser key "data":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'A'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'B':
        Option 'c' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'c': 1}"""
    assert _one_line(message) == "Parser key \"data\": Problem with given class_path 'B': Option 'c' is not accepted"
