"""`sdzero run --dry-run`: its counts are the paper's and a real run's, and it refuses what cannot work."""

from __future__ import annotations

import copy
import math
import socket
from collections import ChainMap
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sdzero.cli.stage_commands import check_stage
from sdzero.methods import SRT, SelfDistill
from sdzero.pipeline.dry_run import Estimate, estimate
from sdzero.pipeline.dry_run.assumptions import ASSUMPTIONS, load_architecture, load_assumptions
from sdzero.pipeline.dry_run.budget import Budget, count_passes, count_validations
from sdzero.pipeline.dry_run.tables import total
from sdzero.pipeline.stages import list_stages, parse
from sdzero.types import Example
from sdzero.utils.recipe import Recipe, load_recipe
from support.runs import ROOT, SMOKE, exit_code, read_json, responses

QWEN_MATH = load_recipe(ROOT / "configs/recipes/qwen3-4b-math")

Configs = dict[str, dict[str, Any]]


def parsed(recipe: Recipe) -> Configs:
    """Whole configs by stage, as for `sdzero run --dry-run`."""
    return parse(list_stages(recipe, Path("runs") / recipe.name), check_stage)


@pytest.fixture(scope="module")
def paper() -> Configs:
    return parsed(QWEN_MATH)


@pytest.fixture
def changed(paper: Configs) -> Configs:
    """The paper's configs, to be changed."""
    return copy.deepcopy(paper)


def by_stage(plan: Estimate) -> dict[str, Budget]:
    return {row.stage: row for row in plan.budgets}


def put(configs: Configs, key: str, value: Any) -> None:
    *path, last = key.split(".")
    reduce(lambda node, part: node[part], path, configs)[last] = value


# --- questions, generations and tokens ------------------------------------------------------------


def test_counts_of_appendix_c2(paper: Configs) -> None:
    """Its own numbers: 40K + 9K generations, 148M + 76.5M tokens sampled, 22.2M + 44.4M + 153M trained."""
    plan = estimate(QWEN_MATH, paper)
    rows = by_stage(plan)
    assert (rows["collect"].generations, rows["collect"].tokens_sampled) == (40_000, 148_000_000)
    assert (rows["self_distill"].generations, rows["self_distill"].tokens_sampled) == (9_000, 76_500_000)
    once = total(plan.one_epoch)
    assert (once.generations, once.tokens_sampled, once.tokens_trained) == (49_000, 224_500_000, 219_600_000)
    assert plan.one_epoch[1].tokens_trained == 22_200_000 + 44_400_000
    # table 4 has three epochs
    assert rows["srt"].tokens_trained == 3 * 66_600_000
    assert rows["self_distill"].tokens_trained == 153_000_000 and rows["self_distill"].at_most
    # six benchmarks x (8 answers + 1 revision), and nothing of it in the sum of the training
    assert rows["srt/eval"].generations == 1129 * 9 and rows["srt/eval"].evaluates
    assert sum(row.generations or 0 for row in plan.budgets if not row.evaluates) == 49_000
    assert any("8,500, is above sampling.max_new_tokens, 8,192" in note for note in plan.memory.notes)


def test_tokens_trained_are_counted_as_the_methods_do() -> None:
    """Without P_r, as in C.2: a trace of two responses of 37 tokens, and a response of 85 read twice."""
    trace = Example("q", (1,), (2,) * 74, num_init=37)
    assert SRT.num_trained(SRT.__new__(SRT), [trace]) == 3 * 37
    assert SelfDistill.num_trained(SelfDistill.__new__(SelfDistill), [Example("q", (1,), (2,) * 85)]) == 2 * 85


def test_a_real_run_sampled_as_much_and_no_more_tokens(smoke_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = estimate(load_recipe(SMOKE), parsed(load_recipe(SMOKE)))
    rows, summary = by_stage(plan), read_json(smoke_run / "summary.json")
    for row in rows.values():
        stage, _, validates = row.stage.partition(" ")
        if stage == "srt" and not validates:
            continue  # samples nothing
        if stage == "self_distill" and not validates:  # its journal forgets what a checkpoint holds
            assert row.generations == summary[2]["num_generations"]
            continue
        folder = smoke_run / stage / "journal"
        kinds = ("eval", "revise") if row.evaluates else ("train", "0") if stage != "collect" else ("",)
        found = [r for kind in kinds for path in (folder, folder / "rank0") for r in responses(path, kind)]
        assert row.generations == len(found), row.stage
        assert (row.tokens_sampled or 0) >= sum(len(r["token_ids"]) for r in found) > 0
    for row in summary[1:]:
        assert rows[row["stage"]].tokens_trained >= row["num_tokens_trained"] > 0
        assert rows[row["stage"]].at_most
    assert any("upper bounds from max_new_tokens" in note for note in plan.memory.notes)
    assert plan.gpu_bytes is None and not plan.memory.refusals and plan.memory.peaks


def trainer(**values: Any) -> dict[str, Any]:
    defaults = {"max_epochs": None, "max_steps": -1, "check_val_every_n_epoch": 1, "val_check_interval": None}
    return {"trainer": {**defaults, **values}}


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.none() | st.integers(1, 4), st.just(-1) | st.integers(1, 40))
def test_steps_and_items_equal_those_of_a_slow_loop(items: int, per_step: int, epochs: int | None, steps: int) -> None:
    passes = count_passes("srt.yaml", trainer(max_epochs=epochs, max_steps=steps), items, per_step)
    seen = done = 0
    for _ in range(1000 if epochs is None else epochs):
        for start in range(0, items, per_step):
            if done != steps:
                seen, done = seen + min(per_step, items - start), done + 1
    assert (passes.steps, passes.items, passes.per_epoch) == (done, seen, math.ceil(items / per_step))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"check_val_every_n_epoch": None, "val_check_interval": 4}, 5),  # steps 4, 8, ... 20 of 21
        ({}, 2),  # after each whole epoch of 10
        ({"check_val_every_n_epoch": 2}, 1),
        ({"val_check_interval": 0.5}, 4),
        ({"val_check_interval": 3}, 6),
    ],
)
def test_validations(options: dict[str, Any], expected: int) -> None:
    config = trainer(max_steps=21, **options)
    assert count_validations(config, count_passes("srt.yaml", config, 10, 1)) == expected


def test_a_training_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"srt\.yaml: trainer\.max_epochs and trainer\.max_steps give"):
        count_passes("srt.yaml", trainer(max_epochs=-1), 10, 1)


def test_traces_are_bounded_by_the_revisions(changed: Configs) -> None:
    changed["collect"] |= {"num_traces": None}
    assert by_stage(estimate(QWEN_MATH, changed))["srt"].questions == 30_000
    changed["collect"] |= {"branches": "incorrect"}  # dry_run.yaml: half of the first attempts are right
    row = by_stage(estimate(QWEN_MATH, changed))["srt"]
    assert row.questions == 15_000 and row.at_most


def test_phase2_only_counts_phase_2_only(paper: Configs) -> None:
    recipe = load_recipe(QWEN_MATH.folder, [ROOT / "configs/ablations/table12_phase2_only"])
    plan = estimate(recipe, {name: config for name, config in paper.items() if not name.startswith(("collect", "srt"))})
    assert total(plan.one_epoch).tokens_sampled == 76_500_000
    assert {peak.stage for peak in plan.memory.peaks} == {"base/eval", "self_distill", "self_distill/eval"}


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["qwen3-4b-math", "olmo3-7b-math", "qwen2.5-7b-countdown"])
def test_the_papers_recipes_fit_their_gpus(paper: Configs, recipe: str) -> None:
    loaded = load_recipe(QWEN_MATH.folder.parent / recipe)
    plan = estimate(loaded, paper if recipe == QWEN_MATH.name else parsed(loaded))
    assert plan.memory.refusals == []
    assert {peak.stage for peak in plan.memory.peaks if peak.name == "backward"} == {"srt", "self_distill"}


ENGINE = "data.init_args.engine.init_args"


@pytest.mark.parametrize(
    ("stage", "key", "value", "parts"),
    [
        ("srt", "trainer.strategy", "auto", ["training of srt needs ", ": shard ", " trainer.strategy"]),
        ("srt", "trainer.devices", 8, ["trainer.devices asks for 8 GPUs; num_gpus of dry_run.yaml is 4"]),
        (
            *("srt", "model.init_args.student.gradient_checkpointing", False),
            ["training ", ": set model.student.gradient_checkpointing: true"],
        ),
        (
            *("self_distill", "trainer.strategy.init_args", {"tensor_parallel_size": 3}),
            ["trainer.strategy.tensor_parallel_size 3 does not divide the number of processes, 4"],
        ),
        (
            *("self_distill", "model.init_args.max_tokens_per_micro_batch", 200_000),
            ["", ": lower model.max_tokens_per_micro_batch; the longest example has 17,408 tokens"],
        ),
        (
            *("self_distill", f"{ENGINE}.gpu_memory_utilization", 0.9),
            ["sampling of ", ": lower engine.gpu_memory_utilization"],
        ),
        (
            *("srt", f"{ENGINE}.gpu_memory_utilization", 0.13),
            ["engine.gpu_memory_utilization leaves ", " raise engine.gpu_memory_utilization"],
        ),
        (
            *("collect", "engine.init_args.tensor_parallel_size", 3),
            ["engine.tensor_parallel_size 3 does not divide the number of processes, 4"],
        ),
        ("collect", "devices", 8, ["devices asks for 8 GPUs; num_gpus of dry_run.yaml is 4"]),
        (
            *("collect", "sampling.max_new_tokens", 140_000),
            ["sampling.max_new_tokens: an answer with its revision needs 281,024 tokens"],
        ),
        (
            *("self_distill", "data.init_args.sampling.max_new_tokens", 131_000),
            ["data.sampling.max_new_tokens: what the teacher reads needs 263,024 tokens"],
        ),
    ],
)
def test_refusals_name_the_key(changed: Configs, stage: str, key: str, value: Any, parts: list[str]) -> None:
    put(changed, f"{stage}.{key}", value)
    refusals = estimate(QWEN_MATH, changed).memory.refusals
    first, *rest = parts
    assert any(line.startswith(f"{stage}.yaml: {first}") and all(part in line for part in rest) for line in refusals)


def test_a_bfloat16_teacher_halves_its_share(changed: Configs) -> None:
    settings = changed["self_distill"]["model"]["init_args"]["student"]

    def teacher() -> int:
        peaks = estimate(QWEN_MATH, changed).memory.peaks
        return next(peak.parts["teacher"] for peak in peaks if peak.stage == "self_distill")

    before = teacher()
    put(changed, "self_distill.model.init_args.teacher", {**settings, "dtype": "bfloat16"})
    assert teacher() == before // 2 and before == 4_022_468_096


# --- the command ----------------------------------------------------------------------------------


def test_the_command_reads_no_weights_asks_no_network_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a connection, or weights")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    (overlay := tmp_path / "crowded").mkdir()
    (overlay / "eval.yaml").write_text("data: {init_args: {engine: {init_args: {gpu_memory_utilization: 0.95}}}}")
    (empty := tmp_path / "empty").mkdir()
    code = exit_code(monkeypatch, "run", QWEN_MATH.folder, "--dry-run", "--overlay", overlay, cwd=empty)
    printed = capsys.readouterr().out
    assert "49,000 generations, ≤ 224.5M tokens sampled, ≤ 219.6M trained" in printed and "≤ 352.8M" in printed
    assert "sequences of mean length beside each other" in printed and "backward" in printed
    lines = str(code).splitlines()
    assert len(lines) == 3 and all(line.startswith("sdzero run: error: eval.yaml: sampling of ") for line in lines)
    assert list(empty.iterdir()) == []


def test_notes_on_a_recipe_without_assumptions_and_without_a_local_model(changed: Configs, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((QWEN_MATH.layers[0].folder / "recipe.yaml").read_text())
    plan = estimate(load_recipe(tmp_path), changed)
    assert not plan.memory.peaks and load_architecture("some/hub-id", None) is None
    assert any("no model folder at Qwen/Qwen3-4B-Instruct-2507" in note for note in plan.memory.notes)
    assert by_stage(plan)["collect"].tokens_sampled == 40_000 * 16_384
    assert by_stage(plan)["srt/eval"].generations is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"mean_tokens": 3}, "unknown key mean_tokens"),
        ({"num_gpus": 0}, "num_gpus must be a number above 0, got 0"),
        ({"num_gpus": None}, "num_gpus must be a number above 0, got None"),
        ({"model": {"model_type": "qwen3"}}, "model.hidden_size is missing"),
        ({"gpu_memory_gib": ...}, "gpu_memory_gib is missing"),
    ],
)
def test_a_wrong_assumption_is_refused_by_its_key(tmp_path: Path, change: dict[str, Any], error: str) -> None:
    (tmp_path / "recipe.yaml").write_text("stages: {base: {trains: false}}")
    files = [layer.folder / ASSUMPTIONS for layer in QWEN_MATH.layers]
    values = ChainMap(change, *(yaml.safe_load(file.read_text()) for file in files))
    given = {key: value for key, value in values.items() if value is not ...}
    (tmp_path / ASSUMPTIONS).write_text(yaml.safe_dump(given))
    with pytest.raises(ValueError, match=error):
        load_assumptions(load_recipe(tmp_path))


def test_an_unknown_model_type_is_named() -> None:
    assumptions = load_assumptions(QWEN_MATH)
    assert assumptions
    assumptions.model["model_type"] = "qwen33"
    with pytest.raises(ValueError, match="model.model_type 'qwen33' is not one of transformers'"):
        load_architecture("some/hub-id", assumptions)
