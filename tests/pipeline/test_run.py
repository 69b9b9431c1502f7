"""`sdzero run`: what it skips, what stops it, and mistakes that it finds before the first stage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sdzero.pipeline import run as pipeline
from sdzero.pipeline.stages import STUDENT, Options, Stage, list_stages
from sdzero.utils.recipe import load_recipe
from support.runs import ROOT, SMOKE, STAGES, exit_code, records, refusal, write_records


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setattr(pipeline, "LOCK_SECONDS", 0.0)
    return lambda *arguments: refusal(capsys, monkeypatch, "run", *arguments)


@pytest.fixture
def copy(smoke_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(smoke_run, tmp_path / "copy")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return shutil.copytree(SMOKE, tmp_path / "recipe")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of the stages that a run would start; the first one raises."""
    commands: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Any:
        commands.append(command)
        raise OSError("no child in this test")

    monkeypatch.setattr(pipeline.subprocess, "Popen", start)
    return commands


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))


def cut_last_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def list_all(recipe: Path, out: Path, **options: Any) -> dict[str, Stage]:
    return {stage.name: stage for stage in list_stages(load_recipe(recipe), out, Options(**options))}


# --- finished stages ------------------------------------------------------------------------------


def test_finished_stages_are_skipped(
    copy: Path, started: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the recipe's own seed and engine are named."""
    before = {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    assert exit_code(monkeypatch, "run", SMOKE, "--out", copy, "--seed", "0", "--engine", "transformers") == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if "finished before" in line] == [
        f"[{i}/7] {name}: finished before" for i, name in enumerate(STAGES, 1)
    ]
    assert "avg@k" in printed and "tensorboard --logdir" in printed and not started
    assert before == {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}


def test_other_devices_change_nothing_and_reach_every_stage(
    copy: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_code(monkeypatch, "run", SMOKE, "--out", copy, "--devices", "4", "--num-nodes", "2") == 0
    assert not started
    for stage in list_all(SMOKE, copy, devices=4, num_nodes=2).values():
        config = stage.settings if stage.command == "collect" else stage.settings["trainer"]
        assert (config["devices"], config["num_nodes"]) == (4, 2)


def test_a_stage_without_its_outputs_or_its_folder_is_run(
    copy: Path, recipe: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "srt/eval/results.json").unlink()
    with pytest.raises(OSError, match="no child"):
        exit_code(monkeypatch, "run", SMOKE, "--out", copy)
    shutil.rmtree(copy / "srt")  # the remedy that is offered where a key has changed
    edit(recipe / "srt.yaml", "traces_per_step: 16", "traces_per_step: 8")
    with pytest.raises(OSError, match="no child"):
        exit_code(monkeypatch, "run", recipe, "--out", copy)
    assert [command[3:] for command in started] == [
        ["test", "--config", f"{copy}/srt/eval/stage.yaml"],
        ["fit", "--config", f"{copy}/srt/stage.yaml", "--ckpt_path=newest"],
    ]
    assert yaml.safe_load((copy / "srt/stage.yaml").read_text())["trainer"]["default_root_dir"] == str(copy / "srt")


# --- changes that stop a run ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "before", "after", "stage", "key"),
    [
        ("srt.yaml", "traces_per_step: 16", "traces_per_step: 8", "srt", "data.init_args.traces_per_step"),
        ("recipe.yaml", "seed_everything: 0", "seed_everything: 1", "base", "seed_everything"),
        ("collect.yaml", "call_size: 32", "call_size: 16", "collect", "call_size"),
        ("collect.yaml", "num_traces: null", "num_traces: 9\nnum_initial: 2", "collect", "num_initial, num_traces"),
        ("eval.yaml", "temperature: 0.7", "temperature: 0.6", "base/eval", "evaluation.sampling.temperature"),
    ],
)
def test_a_changed_key_is_named(
    copy: Path, recipe: Path, refuse: Callable[..., str], file: str, before: str, after: str, stage: str, key: str
) -> None:
    edit(recipe / file, before, after)
    error = refuse(recipe, "--out", copy)
    assert f"stage {stage} of {copy} ran with other config" in error and f"{key} changed" in error
    assert str(copy / stage) in error and "--out" in error


@pytest.mark.parametrize(
    ("options", "stage", "key"),
    [
        (("--seed", "1"), "base", "seed_everything"),
        (("--engine", "vllm"), "base/eval", "data.init_args.engine.class_path"),  # the base has no engine
        (("--overlay", "{overlay}"), "srt", "trainer.max_steps"),
    ],
)
def test_a_key_changed_by_an_option_is_named(
    copy: Path, tmp_path: Path, refuse: Callable[..., str], options: tuple[str, ...], stage: str, key: str
) -> None:
    (overlay := tmp_path / "longer").mkdir()
    (overlay / "srt.yaml").write_text("trainer: {max_steps: 9}")
    error = refuse(SMOKE, "--out", copy, *(option.format(overlay=overlay) for option in options))
    assert f"stage {stage} of" in error and f"{key} changed" in error


def test_a_changed_key_in_a_file_that_the_recipe_names_is_found(
    copy: Path, recipe: Path, refuse: Callable[..., str]
) -> None:
    """Key by key, so that moving a part of a config into its own file changes nothing. After an interruption too."""
    config = yaml.safe_load((recipe / "srt.yaml").read_text())
    (recipe / "parts").mkdir()
    (recipe / "parts/srt_model.yaml").write_text(yaml.safe_dump(config["model"]))
    (recipe / "srt.yaml").write_text(yaml.safe_dump({**config, "model": "parts/srt_model.yaml"}))
    assert list_all(recipe, copy)["srt"].identity() == list_all(SMOKE, copy)["srt"].identity()
    interrupted = records(copy)
    interrupted["srt"].pop("seconds")  # as it stands while the stage runs
    write_records(copy, interrupted)
    edit(recipe / "parts/srt_model.yaml", "lr: 0.0025", "lr: 0.001")
    assert "model.init_args.optimizer.init_args.lr changed" in refuse(recipe, "--out", copy)


def test_changed_inputs_stop_the_run(copy: Path, smoke_run: Path, refuse: Callable[..., str]) -> None:
    traces = copy / "collect/traces.jsonl"
    cut_last_line(traces)
    error = refuse(SMOKE, "--out", copy)
    assert "stage srt of" in error and "other inputs: data.init_args.source.init_args.path changed" in error
    # cut at the end of a line, so that the rest parses, before the stage that reads it has started
    write_records(copy, {name: r for name, r in records(copy).items() if not name.startswith(("srt", "self_distill"))})
    error = refuse(SMOKE, "--out", copy)
    assert f"stage srt would read {traces}, which is not what stage collect wrote" in error
    assert f"remove {copy / 'collect'} to run that stage again" in error
    shutil.copy(smoke_run / "srt/model/model.safetensors", copy / "base/model/model.safetensors")
    error = refuse(SMOKE, "--out", copy)
    assert "stage base/eval of" in error and "other inputs: model.init_args.student.path changed" in error
    os.truncate(copy / "lineage.json", 100)
    assert f"{copy / 'lineage.json'} is damaged" in (error := refuse(SMOKE, "--out", copy)) and "--out" in error


@pytest.mark.parametrize("command", ["run", "report"])
def test_a_run_of_an_older_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "lineage.json").write_text(json.dumps({"base": {"config": {}, "inputs": {}, "spent": 1.0}}))
    arguments = (SMOKE, "--out", tmp_path) if command == "run" else (tmp_path,)
    error = refusal(capsys, monkeypatch, command, *arguments)
    assert f"{tmp_path / 'lineage.json'} has the layout of an older version of sdzero" in error


def test_edited_questions_and_an_edited_verifier_stop_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that a config names, by their path and by a class_path, count as much as its keys."""
    monkeypatch.chdir(tmp_path)
    (out := tmp_path / "out/collect").mkdir(parents=True)
    for output in ("traces.jsonl", "questions.json", "statistics.json"):
        (out / output).touch()
    verifier, questions = tmp_path / "mine/verifier.py", tmp_path / "rows.jsonl"
    verifier.parent.mkdir()
    for file in (verifier, questions):
        file.write_text("as it was")
    task = "{class_path: sdzero.tasks.Chains, init_args: {min_ops: 1, max_ops: 2}}"
    edit(recipe / "recipe.yaml", task, "{class_path: mine.verifier.Mine, init_args: {path: rows.jsonl}}")
    stages = list_all(recipe, out.parent)
    stage = stages["collect"]
    with (tmp_path / ".lock").open("w") as lock:
        run = pipeline.Run(load_recipe(recipe), [*stages.values()], out.parent, lock)
        run.lineage.stages["collect"] = {**run._identity(stage), "spent": 1.0, "seconds": 1.0}
        for file, key in ((verifier, "task.class_path"), (questions, "task.init_args.path")):
            assert run._finished(stage)
            file.write_text("edited")
            with pytest.raises(ValueError, match=f"stage collect of .* other inputs: {key} changed"):
                run._finished(stage)
            file.write_text("as it was")
    assert pipeline._local_file("A system message. " * 300) is None


def test_a_stage_that_fails_ends_the_run_with_its_command(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda: 1))
    edit(recipe / "recipe.yaml", "configs/tiny_model", "no/model")
    edit(recipe / "recipe.yaml", "{label: base, without: [task, engine, max_logprob_gap]}", "{trains: false}")
    error = str(exit_code(monkeypatch, "run", recipe, "--out", tmp_path / "out", "--seed", "3"))
    assert "stage base/eval ended with exit code 1" in error
    assert f"sdzero test --config {tmp_path}/out/base/eval/stage.yaml" in error
    config = yaml.safe_load((tmp_path / "out/base/eval/stage.yaml").read_text())
    assert config["seed_everything"] == 3 and config["model"]["init_args"]["student"]["path"] == "no/model"
    assert "seconds" not in records(tmp_path / "out")["base/eval"]


# --- before the first stage -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "before", "after", "named"),
    [
        ("self_distill.yaml", "prompts_per_step", "prompts_per_stepp", "prompts_per_stepp"),
        ("self_distill.yaml", "max_steps: 5", "max_steps: 5\n  max_stps: 3", "max_stps"),
        ("srt.yaml", "warmup_ratio", "warmup_rate", "warmup_rate"),
        ("collect.yaml", "call_size: 32", "call_size: many", "call_size"),
        ("eval.yaml", "sdzero.methods.Policy", "sdzero.methods.Polizy", "sdzero.methods.Polizy"),
        ("eval.yaml", "num_samples: 8", "num_samples: [8", "eval.yaml"),
    ],
)
def test_a_wrong_key_in_a_late_stage_shows_at_the_start(
    recipe: Path, tmp_path: Path, refuse: Callable[..., str], file: str, before: str, after: str, named: str
) -> None:
    edit(recipe / file, before, after)
    assert named in refuse(recipe, "--out", tmp_path / "out")
    assert not (tmp_path / "out/lineage.json").exists()


def test_a_missing_vllm_shows_at_the_start(
    tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pipeline.sys.modules, "vllm", None)
    error = refuse(SMOKE, "--out", tmp_path / "out", "--engine", "vllm")
    assert "data.init_args.engine: vLLM is not installed" in error and "--engine transformers" in error


def test_refused_arguments_leave_nothing_behind(tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "is not a recipe: it has no recipe.yaml" in refuse(tmp_path, "--out", tmp_path / "out")
    old_option = refuse(SMOKE, "--out", tmp_path / "out", "--phase2-only")
    assert "--overlay configs/ablations/table12_phase2_only" in old_option and not (tmp_path / "out").exists()


def test_the_runs_folder_is_named_after_recipe_and_overlays(tmp_path: Path) -> None:
    recipe = load_recipe(SMOKE)
    assert pipeline._run_name(recipe, []) == "smoke"
    assert pipeline._run_name(recipe, [tmp_path / "table11", SMOKE]) == "smoke+table11+smoke"


def test_phase_2_alone_starts_from_the_base(tmp_path: Path) -> None:
    """Table 12, with a base that is trained and with one that is not."""
    table_12 = ROOT / "configs/ablations/table12_phase2_only"
    for recipe, base in (("smoke", tmp_path / "base/model"), ("qwen3-4b-math", Path("Qwen/Qwen3-4B-Instruct-2507"))):
        loaded = load_recipe(ROOT / "configs/recipes" / recipe, [table_12])
        stages = {stage.name: stage for stage in list_stages(loaded, tmp_path)}
        assert [*stages][-3:] == ["base/eval", "self_distill", "self_distill/eval"] and len(stages) < 5
        assert stages["self_distill"].inputs == stages["base/eval"].inputs == {STUDENT: base}
        assert "data.init_args.disjoint_from" not in stages["self_distill"].identity()
