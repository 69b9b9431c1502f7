"""recipe.yaml: the stages it lists, what they share and cost, and what is wrong with one before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sdzero.pipeline.stages import STUDENT, list_stages
from sdzero.utils.lineage import Lineage, Outline, read_lineage
from sdzero.utils.recipe import list_models, load_recipe

SOURCE = "data.init_args.source.init_args.path"
TRACES, QUESTIONS = "collect/traces.jsonl", "collect/questions.json"
THREE_METHODS = {
    "base": {"trains": False, "label": "Base"},
    "collect": {"command": "collect"},
    "sft": {"label": "SFT", "takes": {SOURCE: TRACES}},
    "srt": {"label": "SRT", "starts_from": "base", "takes": {SOURCE: TRACES}},
    "sd": {"label": "SD", "starts_from": "base", "takes": {"data.init_args.disjoint_from": QUESTIONS}},
    "sd_of_srt": {"label": "SD of SRT", "starts_from": "srt", "takes": {"model.init_args.teacher.path": "base/model"}},
}


def write(folder: Path, recipe: Any, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in {"recipe": recipe, **files}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    files = {name: {"trainer": {"max_steps": 1}} for name in THREE_METHODS if name not in ("base", "collect")}
    shared = {"student": {"path": "hub/id"}, "seed_everything": 4, "trainer": {"devices": 2}}
    shared |= {"engine": {"class_path": "E", "init_args": {"a": 1}}}
    files |= {"collect": {"num_questions": 3}, "eval": {"data": {"init_args": {"engine": {"init_args": {"b": 2}}}}}}
    return write(tmp_path / "recipe", {"shared": shared, "stages": THREE_METHODS}, **files)


def test_stages_that_methods_share_are_run_once(recipe: Path) -> None:
    stages = list_stages(load_recipe(recipe), Path("out"))
    trained = ("sft", "srt", "sd", "sd_of_srt")
    assert [s.name for s in stages] == ["base/eval", "collect", *(n for t in trained for n in (t, f"{t}/eval"))]
    inputs = {stage.name: stage.inputs for stage in stages}
    assert inputs["collect"] == {"student.path": Path("hub/id")}
    assert inputs["sft"] == {STUDENT: Path("hub/id"), SOURCE: Path("out") / TRACES}
    assert inputs["srt"] == inputs["sft"] and inputs["sd"][STUDENT] == Path("hub/id")
    assert inputs["sd_of_srt"] == {STUDENT: Path("out/srt/model"), "model.init_args.teacher.path": Path("hub/id")}
    assert inputs["sd/eval"] == {STUDENT: Path("out/sd/model")}


def test_what_a_model_cost_is_its_own_training_and_the_traces_it_learns_from(recipe: Path) -> None:
    models = {model.name: model for model in list_models(load_recipe(recipe).entries)}
    assert {name: model.cost_stages for name, model in models.items()} == {
        "base": (),
        "sft": ("collect", "sft"),
        "srt": ("collect", "srt"),
        "sd": ("sd",),  # question ids alone cost nothing
        "sd_of_srt": ("sd_of_srt",),  # SRT has paid for the traces
    }
    assert [model.starts_from for model in models.values()] == [None, "base", "base", "base", "srt"]
    assert models["sd"].label == "SD" and models["sd"].evaluation == "sd/eval"


def test_what_stages_share_lies_beneath_their_files(recipe: Path) -> None:
    stages = {stage.name: stage for stage in list_stages(load_recipe(recipe), Path("out"))}
    collect = stages["collect"].settings
    assert collect == {
        "student": {"path": "hub/id"},
        "seed_everything": 4,
        "engine": {"class_path": "E", "init_args": {"a": 1}},
        "num_questions": 3,
    }
    evaluation = yaml.safe_load(stages["sft/eval"].to_yaml())
    assert evaluation["data"]["init_args"]["engine"] == {"class_path": "E", "init_args": {"a": 1, "b": 2}}
    assert evaluation["trainer"] == {"devices": 2, "default_root_dir": "out/sft/eval"}
    assert evaluation["model"]["init_args"]["student"]["path"] == "out/sft/model"
    assert stages["sft"].sources == (recipe / "recipe.yaml", recipe / "sft.yaml")


def test_layers_from_the_extended_folder_to_the_last_overlay(recipe: Path, tmp_path: Path) -> None:
    above = write(tmp_path / "above", {"extends": "../recipe", "shared": {"student": {"path": "mine"}}})
    first = write(tmp_path / "first", {"shared": {"seed_everything": 5}}, srt={"trainer": {"max_steps": 2}})
    stages = {"base": None, "srt": {"label": "only SRT"}, "new": {"file": "srt.yaml", "label": "again"}}
    second = write(tmp_path / "second", {"stages": stages}, srt={"trainer": {"devices": 3}})
    loaded = load_recipe(above, [first, second])
    assert [entry.name for entry in loaded.entries] == ["base", "srt", "new"] and not loaded.entries[0].trains
    assert loaded.name == "above" and loaded.student_path() == "mine"
    by_name = {stage.name: stage for stage in list_stages(loaded, Path("out"))}
    trainer = {"devices": 3, "max_steps": 2}
    assert by_name["srt"].settings["trainer"] == by_name["new"].settings["trainer"] == trainer
    assert by_name["srt"].settings["seed_everything"] == 5
    assert by_name["new"].inputs == {STUDENT: Path("out/srt/model")}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"a": {}, "b": {"starts_from": "c"}}, r"stages\.b: there is no stage c; the stages are a, b"),
        ({"a": {"takes": {"k": "c/x"}}}, r"stages\.a: there is no stage c"),
        ({"a": {"takes": {"k": "b/x"}}, "b": {}}, r"a loop: .*a needs b|a loop: .*b needs a"),
        ({"a": {"takes": {"k": "b/x"}}, "b": {"starts_from": None}}, r"stages\.a: needs b, which is listed after it"),
        ({"a": {"label": "A"}, "b": {"label": "A"}}, "two models have the label 'A'"),
        ({"a": {"command": "collect"}, "b": {"starts_from": "a"}}, r"stages\.b\.starts_from: a is a collection"),
        ({"a": {"comand": "fit"}}, r"stages\.a: unknown key comand; the keys are command, file"),
        ({"a": {"command": "test"}}, r"stages\.a\.command: must be fit or collect, got 'test'"),
        ({"a": {"without": ["tasks"]}}, r"stages\.a\.without: unknown key tasks"),
        ({"a": {"trains": False, "takes": {}}}, r"stages\.a: unknown key takes; the keys are label, trains"),
        ({"a/b": {}}, "a stage's name has letters"),
        ({"a": "fit"}, r"stages\.a: must be a mapping, got 'fit'"),
        ({}, "stages is missing"),
    ],
)
def test_wrong_stages_are_named(tmp_path: Path, stages: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"recipe\.yaml: .*{said}|recipe\.yaml: ({said})"):
        load_recipe(write(tmp_path / "recipe", {"stages": stages}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: {a: {}, a: {}}", "'a' occurs twice"),
        ("stage: {a: {}}", "unknown key stage; the keys are extends, shared, evaluation, stages"),
        ("{shared: {model: 1}, stages: {a: {}}}", "shared: unknown key model"),
        ("{extends: ../nowhere, stages: {a: {}}}", "extends: there is no"),
        ("{extends: ../recipe, stages: {a: {}}}", "extends: the folders extend each other"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path / "recipe", {})
    (tmp_path / "recipe/recipe.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"recipe\.yaml.*{said}"):
        load_recipe(tmp_path / "recipe")


def test_what_a_run_needs_is_there_before_it_starts(recipe: Path, tmp_path: Path) -> None:
    (recipe / "sft.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"recipe\.yaml: stages\.sft: there is no .*sft\.yaml"):
        list_stages(load_recipe(recipe), tmp_path)
    (recipe / "eval.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"recipe\.yaml: evaluation: there is no .*eval\.yaml"):
        list_stages(load_recipe(recipe), tmp_path)
    nameless = write(tmp_path / "nameless", {"stages": {"base": {"trains": False}}}, eval={})
    with pytest.raises(ValueError, match=r"shared\.student\.path is missing"):
        list_stages(load_recipe(nameless), tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("self-distill", "srt"), "self-distill.yaml is not one of"),
        ((), "it has none of collect.yaml, eval.yaml, recipe.yaml"),
        (None, "there is no such folder"),
    ],
)
def test_an_overlay_that_changes_nothing_is_an_error(recipe: Path, tmp_path: Path, files: Any, said: str) -> None:
    if files is not None:
        (tmp_path / "overlay").mkdir()
    for name in files or ():
        (tmp_path / f"overlay/{name}.yaml").write_text("{}")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_recipe(recipe, [tmp_path / "overlay"])


# --- lineage.json ---------------------------------------------------------------------------------


def test_a_lineage_is_read_as_it_was_written(recipe: Path, tmp_path: Path) -> None:
    lineage = Lineage(Outline("mine", load_recipe(recipe).entries), {"base/eval": {"seconds": 1.0}, "collect": {}})
    (tmp_path / "lineage.json").write_text(lineage.to_json())
    read = read_lineage(tmp_path)
    assert read == lineage and [model.name for model in read.models] == ["base", "sft", "srt", "sd", "sd_of_srt"]
    assert read.unfinished()[:3] == ["collect", "sft", "sft/eval"]
    assert [stage.name for stage in read.collections] == ["collect"]


def test_without_a_lineage_every_folder_is_a_stage(tmp_path: Path) -> None:
    for name in ("collect", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "collect/traces.jsonl").touch()
    read = read_lineage(tmp_path)
    assert [(stage.name, stage.command) for stage in read.recipe.stages] == [("collect", "collect"), ("mine", "fit")]
