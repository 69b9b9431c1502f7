"""`sdzero run`: what is skipped, what stops it, and that its summary is that of an independent recount."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sdzero.data import TraceDataModule, TraceFile
from sdzero.data.trace_file import read_traces
from sdzero.evaluation.keywords import count_keywords
from sdzero.models.weights import folder_sha256
from sdzero.pipeline import run as pipeline
from sdzero.pipeline.stages import STUDENT, Options, Stage, list_stages
from sdzero.tasks import Chains
from sdzero.utils.recipe import load_recipe
from support.runs import (
    MODELS,
    ROOT,
    SMOKE,
    STAGES,
    exit_code,
    num_calls,
    read_json,
    records,
    refusal,
    responses,
    scalars,
    write_records,
)

# a validation is two calls: answers, and revisions of them
CALLS = {"collect": 8, "srt": 2 * 2, "self_distill": 5 + 2, "base/eval": 4, "srt/eval": 4, "self_distill/eval": 4}


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


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))


def write_files(folder: Path, **files: str) -> Path:
    """A folder of YAML files."""
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def list_all(recipe: Path, out: Path, **options: Any) -> dict[str, Stage]:
    return {stage.name: stage for stage in list_stages(load_recipe(recipe), out, Options(**options))}


def no_child(*_: Any, **__: Any) -> None:
    pytest.fail("a stage was started")


# --- what is run again, and what stops a run ------------------------------------------------------


def test_finished_stages_are_skipped(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    monkeypatch.setattr(pipeline.subprocess, "Popen", no_child)
    assert exit_code(monkeypatch, "run", SMOKE, "--out", copy) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "finished before" in line] == [
        f"[{i}/7] {name}: finished before" for i, name in enumerate(STAGES, 1)
    ]
    assert "avg@k" in said and "tensorboard --logdir" in said
    assert before == {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}


def test_a_stage_without_its_outputs_or_its_folder_is_run(
    copy: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        started.append(command)
        raise OSError("no child in this test")

    monkeypatch.setattr(pipeline.subprocess, "Popen", run)
    (copy / "srt/eval/results.json").unlink()
    with pytest.raises(OSError, match="no child"):
        exit_code(monkeypatch, "run", SMOKE, "--out", copy)
    shutil.rmtree(copy / "srt")  # the remedy that is offered where a key has changed
    edit(recipe / "srt.yaml", "traces_per_step: 16", "traces_per_step: 8")
    with pytest.raises(OSError, match="no child"):
        exit_code(monkeypatch, "run", recipe, "--out", copy)
    assert [command[3] for command in started] == ["test", "fit"]
    assert started[1][4:] == ["--config", f"{copy}/srt/stage.yaml", "--ckpt_path=newest"]
    assert started[0][4:] == ["--config", f"{copy}/srt/eval/stage.yaml"]
    assert yaml.safe_load((copy / "srt/stage.yaml").read_text())["trainer"]["default_root_dir"] == str(copy / "srt")


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
def test_a_changed_key_stops_the_run_and_is_named(
    copy: Path, recipe: Path, refuse: Callable[..., str], file: str, before: str, after: str, stage: str, key: str
) -> None:
    edit(recipe / file, before, after)
    said = refuse(recipe, "--out", copy)
    assert f"stage {stage} of {copy} ran with other config" in said and f"{key} changed" in said
    assert str(copy / stage) in said and "--out" in said


def test_a_changed_key_in_a_file_that_the_recipe_names_is_found(
    copy: Path, recipe: Path, refuse: Callable[..., str]
) -> None:
    """Key by key, so that moving a part of a config into a file of its own changes nothing."""
    config = yaml.safe_load((recipe / "srt.yaml").read_text())
    (recipe / "parts").mkdir()
    (recipe / "parts/srt_model.yaml").write_text(yaml.safe_dump(config["model"]))
    (recipe / "srt.yaml").write_text(yaml.safe_dump({**config, "model": "parts/srt_model.yaml"}))
    assert list_all(recipe, copy)["srt"].identity() == list_all(SMOKE, copy)["srt"].identity()
    edit(recipe / "parts/srt_model.yaml", "lr: 0.0025", "lr: 0.001")
    assert "model.init_args.optimizer.init_args.lr changed" in refuse(recipe, "--out", copy)


def test_another_seed_or_engine_on_the_command_line_is_a_changed_key(copy: Path, refuse: Callable[..., str]) -> None:
    assert (
        "stage base of" in (said := refuse(SMOKE, "--out", copy, "--seed", "1")) and "seed_everything changed" in said
    )
    said = refuse(SMOKE, "--out", copy, "--engine", "vllm")
    assert "stage base/eval of" in said and "data.init_args.engine.class_path changed" in said  # the base has no engine


def test_naming_the_recipes_own_seed_and_engine_changes_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.subprocess, "Popen", no_child)
    arguments = ("run", SMOKE, "--out", copy, "--seed", "0", "--engine", "transformers")
    assert exit_code(monkeypatch, *arguments) == 0


def test_another_place_changes_nothing_and_is_told_to_every_stage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that one process began, others may go on with."""
    monkeypatch.setattr(pipeline.subprocess, "Popen", no_child)
    assert exit_code(monkeypatch, "run", SMOKE, "--out", copy, "--devices", "4", "--num-nodes", "2") == 0
    for stage in list_all(SMOKE, copy, devices=4, num_nodes=2).values():
        config = stage.settings if stage.command == "collect" else stage.settings["trainer"]
        assert (config["devices"], config["num_nodes"]) == (4, 2)


def test_changed_traces_stop_the_run(copy: Path, refuse: Callable[..., str]) -> None:
    traces = copy / "collect/traces.jsonl"
    traces.write_text("".join(traces.read_text().splitlines(keepends=True)[:-1]))
    said = refuse(SMOKE, "--out", copy)
    assert "stage srt of" in said and "other inputs: data.init_args.source.init_args.path changed" in said


def test_a_file_that_was_cut_since_its_stage_wrote_it_stops_the_next(copy: Path, refuse: Callable[..., str]) -> None:
    """At the end of a line: what is left reads well, and the stage that would read it has not started before."""
    write_records(copy, {name: r for name, r in records(copy).items() if not name.startswith(("srt", "self_distill"))})
    traces = copy / "collect/traces.jsonl"
    traces.write_text("".join(traces.read_text().splitlines(keepends=True)[:-1]))
    said = refuse(SMOKE, "--out", copy)
    assert f"stage srt would read {traces}, which is not what stage collect wrote" in said
    assert f"remove {copy / 'collect'} to run that stage again" in said


def test_a_damaged_lineage_is_named(copy: Path, refuse: Callable[..., str]) -> None:
    os.truncate(copy / "lineage.json", 100)
    assert f"{copy / 'lineage.json'} is damaged" in (said := refuse(SMOKE, "--out", copy)) and "--out" in said


@pytest.mark.parametrize("command", ["run", "report"])
def test_a_run_of_an_older_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "lineage.json").write_text(json.dumps({"base": {"config": {}, "inputs": {}, "spent": 1.0}}))
    arguments = (SMOKE, "--out", tmp_path) if command == "run" else (tmp_path,)
    said = refusal(capsys, monkeypatch, command, *arguments)
    assert f"{tmp_path / 'lineage.json'} has the layout of an older version of sdzero" in said


def test_edited_questions_and_an_edited_verifier_stop_the_run(
    copy: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that a config names, by their path and by a class_path, count as much as its keys."""
    monkeypatch.chdir(tmp_path)
    verifier, questions = tmp_path / "mine/verifier.py", tmp_path / "rows.jsonl"
    verifier.parent.mkdir()
    for file in (verifier, questions):
        file.write_text("as it was")
    task = "{class_path: sdzero.tasks.Chains, init_args: {min_ops: 1, max_ops: 2}}"
    edit(recipe / "recipe.yaml", task, "{class_path: mine.verifier.Mine, init_args: {path: rows.jsonl}}")
    stages = list_all(recipe, copy)
    stage = stages["collect"]
    with (copy / ".lock").open("w") as lock:
        run = pipeline.Run(load_recipe(recipe), [*stages.values()], copy, lock)
        run.lineage.stages["collect"] = {**run._identity(stage), "spent": 1.0, "seconds": 1.0}
        assert run._finished(stage)
        for file, key in ((verifier, "task.class_path"), (questions, "task.init_args.path")):
            file.write_text("edited")
            with pytest.raises(ValueError, match=f"stage collect of .* other inputs: {key} changed"):
                run._finished(stage)
            file.write_text("as it was")
        assert run._finished(stage)
    assert pipeline._local_file("A system message. " * 300) is None


def test_changed_weights_stop_the_run(copy: Path, smoke_run: Path, refuse: Callable[..., str]) -> None:
    shutil.copy(smoke_run / "srt/model/model.safetensors", copy / "base/model/model.safetensors")
    said = refuse(SMOKE, "--out", copy)
    assert "stage base/eval of" in said and "other inputs: model.init_args.student.path changed" in said


def test_a_key_changed_after_an_interruption_is_found_too(copy: Path, recipe: Path, refuse: Callable[..., str]) -> None:
    begun = records(copy)
    begun["srt"].pop("seconds")  # as it stands while the stage runs
    write_records(copy, begun)
    edit(recipe / "srt.yaml", "lr: 2.5e-3", "lr: 1.0e-3")
    assert "model.init_args.optimizer.init_args.lr changed" in refuse(recipe, "--out", copy)


def test_a_stage_that_fails_ends_the_run_with_its_command(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda: 1))
    edit(recipe / "recipe.yaml", "configs/tiny_model", "no/model")
    edit(recipe / "recipe.yaml", "{label: base, without: [task, engine, max_logprob_gap]}", "{trains: false}")
    said = str(exit_code(monkeypatch, "run", recipe, "--out", tmp_path / "out", "--seed", "3"))
    assert "stage base/eval ended with exit code 1" in said
    assert f"sdzero test --config {tmp_path}/out/base/eval/stage.yaml" in said
    config = yaml.safe_load((tmp_path / "out/base/eval/stage.yaml").read_text())
    assert config["seed_everything"] == 3 and config["model"]["init_args"]["student"]["path"] == "no/model"
    assert "seconds" not in records(tmp_path / "out")["base/eval"]


# --- mistakes that show before the first stage ----------------------------------------------------


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
    said = refuse(SMOKE, "--out", tmp_path / "out", "--engine", "vllm")
    assert "data.init_args.engine: vLLM is not installed" in said and "--engine transformers" in said


def test_a_folder_that_is_not_a_recipe_leaves_nothing_behind(tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "is not a recipe: it has no recipe.yaml" in refuse(tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- overlays, and phase 2 alone ------------------------------------------------------------------


def test_an_overlay_over_a_finished_run_is_a_changed_key(
    copy: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    overlay = write_files(tmp_path / "longer", srt="trainer: {max_steps: 9}")
    said = refuse(SMOKE, "--out", copy, "--overlay", overlay)
    assert "stage srt of" in said and "other config: trainer.max_steps changed" in said


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


def test_the_old_option_names_what_took_its_place(tmp_path: Path, refuse: Callable[..., str]) -> None:
    said = refuse(SMOKE, "--out", tmp_path / "out", "--phase2-only")
    assert "--overlay configs/ablations/table12_phase2_only" in said and not (tmp_path / "out").exists()


# --- what a run leaves ----------------------------------------------------------------------------


def test_lineage_has_config_versions_and_hashes(smoke_run: Path) -> None:
    lineage, stages = records(smoke_run), list_all(SMOKE, smoke_run)
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
        assert lineage[name]["outputs"] == {
            "model": weights,
            "questions-fit.json": sha256(f"{name}/questions-fit.json"),
        }
        assert lineage[f"{name}/eval"]["inputs"] == {"model.init_args.student.path": weights}
        files = ("results.json", "rewards.json", "questions-test.json")
        assert lineage[f"{name}/eval"]["outputs"] == {file: sha256(f"{name}/eval/{file}") for file in files}
    traces, questions = sha256("collect/traces.jsonl"), sha256("collect/questions.json")
    assert lineage["collect"]["inputs"] == {"student.path": lineage["base"]["outputs"]["model"]}
    assert lineage["collect"]["outputs"].items() >= {"traces.jsonl": traces, "questions.json": questions}.items()
    assert set(lineage["srt"]["inputs"].values()) == {traces, lineage["base"]["outputs"]["model"]}
    assert set(lineage["self_distill"]["inputs"].values()) == {questions, lineage["srt"]["outputs"]["model"]}


KEYS = {
    "stage",
    "accuracy",
    "accuracy_se",
    "pass_at_8",
    "mean_response_tokens",
    "keyword_rate",
    "wrong_to_right",
    "right_to_wrong",
    "num_generations",
    "num_tokens_sampled",
    "num_tokens_trained",
    "seconds",
    "weights_sha256",
}


def test_summary_is_what_a_recount_of_the_evaluations_says(smoke_run: Path) -> None:
    summary = read_json(smoke_run / "summary.json")
    assert [row["stage"] for row in summary] == list(MODELS)
    task = Chains(min_ops=1, max_ops=2)
    questions = {q.id: q for q in task.questions("eval", 16)}

    def right(response: dict[str, Any]) -> bool:
        finished = response["finish_reason"] == "stop"
        return finished and bool(task.verify(questions[response["question"]], response["text"]).reward)

    for row in summary:
        assert row.keys() >= KEYS
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


def test_budgets_are_what_training_each_model_cost(smoke_run: Path) -> None:
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
