"""The paper's recipes: its tables, key by key, and one step of each stage with a tiny model.

They run where the hub's names are folders, as they are for whoever has the files: made-up rows, and tiny models of the
right architecture. Only counts and lengths are overridden.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sdzero.cli.stage_commands import check_stage
from sdzero.data.trace_file import write_traces
from sdzero.pipeline.stages import list_stages, parse
from sdzero.prompts import PromptBuilder
from sdzero.types import Question, Trace
from sdzero.utils.recipe import RECIPE, load_recipe
from sdzero.utils.yaml_config import flatten, load_config
from support.fixtures.make import MAKERS, make
from support.runs import ROOT, exit_code, read_json, rows
from support.tiny_model import write_tiny

RECIPES = {
    "qwen3-4b-math": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3-4b-code": "Qwen/Qwen3-4B-Instruct-2507",
    "olmo3-7b-math": "allenai/Olmo-3-7B-Instruct",
    "olmo3-7b-code": "allenai/Olmo-3-7B-Instruct",
    "qwen2.5-7b-countdown": "Qwen/Qwen2.5-7B-Instruct",
}
ARCHITECTURES = {
    "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", {"head_dim": 32}),
    "allenai/Olmo-3-7B-Instruct": ("olmo3", {}),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", {}),
}
OVERLAYS = sorted(path.name for path in (ROOT / "configs/ablations").iterdir())

# Tables 4 and 6, as they are printed; keys are those of the recipes
TABLE_4 = {
    "model.init_args.optimizer.class_path": "torch.optim.AdamW",
    "model.init_args.optimizer.init_args.lr": 5e-6,
    "model.init_args.schedule.name": "cosine",
    "model.init_args.schedule.warmup_ratio": 0.05,
    "trainer.max_epochs": 3,
    "model.init_args.optimizer.init_args.weight_decay": 1e-4,
    "model.init_args.optimizer.init_args.betas.0": 0.9,
    "model.init_args.optimizer.init_args.betas.1": 0.95,
    "data.init_args.traces_per_step": 4,
    "model.init_args.max_tokens_per_micro_batch": 32768,
    "model.init_args.student.gradient_checkpointing": True,
    "trainer.precision": "bf16-mixed",
}
TABLE_6 = {
    "model.init_args.optimizer.class_path": "torch.optim.AdamW",
    "model.init_args.optimizer.init_args.lr": 5e-6,
    "model.init_args.optimizer.init_args.weight_decay": 0.01,
    "model.init_args.schedule.name": "constant",
    "model.init_args.schedule.warmup_steps": 20,
    "model.init_args.max_grad_norm": 1.0,
    "model.init_args.divergence.kind": "reverse",
    "model.init_args.divergence.top_k": 64,
    "model.init_args.divergence.support": "teacher",
    "model.init_args.divergence.outside": "renormalize",
    "model.init_args.student.gradient_checkpointing": True,
    "data.init_args.prompts_per_step": 128,
    "data.init_args.rollouts_per_prompt": 1,
    "data.init_args.call_size": 64,
    "data.init_args.sampling.temperature": 1.0,
    "data.init_args.sampling.top_p": 1.0,
    "data.init_args.evaluation.num_questions": 64,
    "trainer.val_check_interval": 20,
    "trainer.precision": "bf16-mixed",
}
SECTION_3_1 = {
    "data.init_args.evaluation.num_samples": 8,
    "data.init_args.evaluation.sampling.temperature": 0.7,
    "data.init_args.evaluation.sampling.max_new_tokens": 32768,
}
APPENDIX_C1 = {
    "num_questions": 10_000,
    "num_initial": 1,
    "num_revisions": 3,
    "num_traces": 6_000,
    "sampling.temperature": 0.7,
    "sampling.max_new_tokens": 16384,
    "task.init_args.sizes.phase1": 10_000,
    "task.init_args.sizes.phase2": 9_000,
}


def composed(recipe: str, stage: str, *overlays: Path) -> dict[str, Any]:
    """Flat config of a stage, or of the evaluation."""
    loaded = load_recipe(ROOT / "configs/recipes" / recipe, overlays)
    entries = {entry.name: entry for entry in loaded.entries}
    return flatten(loaded.compose(entries.get(stage))[0])


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "countdown" not in name])
@pytest.mark.parametrize(
    ("stage", "table"),
    [("collect", APPENDIX_C1), ("srt", TABLE_4), ("self_distill", TABLE_6), ("eval", SECTION_3_1)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_has_the_values_of_the_paper(recipe: str, stage: str, table: dict[str, Any]) -> None:
    config = composed(recipe, stage)
    assert {key: config.get(key) for key in table} == table


def test_lengths_and_numbers_of_phase_2() -> None:
    for recipe in RECIPES:
        config = composed(recipe, "self_distill")
        length, num = config["data.init_args.sampling.max_new_tokens"], config["data.init_args.num_questions"]
        assert (length, num) == ((4096, 8000) if "countdown" in recipe else (8192, 9000))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("stage", "table"), [("srt", TABLE_4), ("self_distill", TABLE_6)], ids=["srt", "self_distill"])
def test_every_value_of_a_table_names_it_on_its_line(recipe: str, stage: str, table: dict[str, Any]) -> None:
    folders = (layer.folder for layer in load_recipe(ROOT / "configs/recipes" / recipe).layers)
    files = [folder / name for folder in folders for name in (f"{stage}.yaml", RECIPE)]
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()]
    for key in table:
        name = key.removesuffix(".0").removesuffix(".1").rpartition(".")[2]
        where = [line for line in lines if re.search(rf"(?<!\w){name}:", line.partition("#")[0])]
        assert where and (name == "class_path" or all("#" in line for line in where)), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_parses_over_its_recipe(overlay: str) -> None:
    """Every key of its files changes something."""
    folder = ROOT / "configs/ablations" / overlay
    recipe = "olmo3-7b-math" if overlay.endswith("olmo3") else "qwen3-4b-math"
    loaded = load_recipe(ROOT / "configs/recipes" / recipe, [folder])
    stages = list_stages(loaded, Path("runs"))
    parse(stages, check_stage)
    before = {stage.name: stage.identity() for stage in list_stages(load_recipe(loaded.folder), Path("runs"))}
    own = [path for path in folder.glob("*.yaml") if path.name != RECIPE]
    assert loaded.layers[-1].content or own
    for stage in stages:
        changed = {key for key, value in stage.identity().items() if before[stage.name].get(key) != value}
        if sources := [path for path in own if path in stage.sources]:
            wanted = {key.replace("+", "") for path in sources for key in flatten(load_config(path))}
            wanted = {key for key in wanted if ".task." not in f".{key}" and ".callbacks." not in key}
            assert wanted <= changed, stage.name
        if loaded.layers[-1].shared:
            assert changed


# --- one step of each stage -----------------------------------------------------------------------

COUNTS = {  # all that is overridden: numbers of questions, and lengths
    "collect": {"num_questions": 2, "sampling.max_new_tokens": 6},
    "srt": {"data.evaluation.num_questions": 1, "data.evaluation.sampling.max_new_tokens": 6},
    "self_distill": {
        "data.num_questions": 2,
        "data.sampling.max_new_tokens": 6,
        "data.evaluation.num_questions": 1,
        "data.evaluation.sampling.max_new_tokens": 6,
    },
    "eval": {"data.task.num_questions": 1, "data.evaluation.sampling.max_new_tokens": 6},  # one of each benchmark
}
SIZES = {"phase1": 4, "phase2": 4, "eval": 4}
NUM_BENCHMARKS = {"math": 6, "code": 2, "countdown": 5}
OUT_OF_DOMAIN = ("aime24", "aime25", "countdown", "ifbench", "ifeval", "mmlu", "mmlu_pro")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the hub's names are folders."""
    folder = tmp_path_factory.mktemp("hub")
    for id in MAKERS:
        make(folder, id)
    for path, (kind, options) in ARCHITECTURES.items():
        write_tiny(folder / path, kind, **options)
    return folder


def overrides(recipe: str, stage: str) -> list[str]:
    config = composed(recipe, stage)
    options: dict[str, Any] = dict(COUNTS[stage])
    if stage == "eval" and "countdown" in recipe:  # verifiers that need more data than pip brings
        options["data.task.num_questions"] = {name: int(not name.startswith("if")) for name in OUT_OF_DOMAIN}
    for key in config:
        prefix, _, name = key.rpartition(".sizes.")
        if name in SIZES:
            options[f"{prefix.replace('init_args.task', 'task')}.sizes.{name}"] = SIZES[name]
    counts_and_lengths = ("num_questions", "max_new_tokens", "phase1", "phase2", "eval")
    assert all(key.endswith(counts_and_lengths) for key in options)
    return [f"--{key}={value}" for key, value in options.items()]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, recipe: str, stage: str) -> Any:
    command = {"collect": "collect", "eval": "test"}.get(stage, "fit")
    config = ROOT / f"configs/recipes/{recipe}/{stage}.yaml"
    return exit_code(monkeypatch, command, "--config", config, *overrides(recipe, stage), cwd=folder)


def made_up_traces(model: Path, ids: list[str]) -> list[Trace]:
    """Traces that a collection would have kept, had random weights answered anything right."""
    builder = PromptBuilder.from_pretrained(model)
    traces = []
    for number, id in enumerate(ids):
        question, reward = Question(id, "Made up: 1+1=", "2"), number % 2
        prompt = builder.prompt(question).token_ids
        answer = builder.chat("1")[-3:]
        traces.append(Trace(question, prompt, answer, builder.bridge(reward), (*answer, builder.end_id), reward))
    return traces


# each model and each task once
@pytest.mark.parametrize(
    "recipe", ["qwen3-4b-math", pytest.param("olmo3-7b-code", marks=pytest.mark.sandbox), "qwen2.5-7b-countdown"]
)
def test_one_step_of_each_stage(recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "runs" / recipe
    output = str(run(monkeypatch, folder, recipe, "collect"))
    assert "no trace was left: of 6 revisions 0 were verified as correct" in output  # weights are random
    assert read_json(out / "collect/statistics.json")["num_generations"] == 2 + 6
    asked = read_json(out / "collect/questions.json")
    write_traces(out / "collect/traces.jsonl", made_up_traces(folder / RECIPES[recipe], asked[:4]))
    assert run(monkeypatch, folder, recipe, "srt") == 0
    assert run(monkeypatch, folder, recipe, "self_distill") == 0
    assert read_json(out / "self_distill/model/sdzero.json")["num_generations"] == 2
    assert run(monkeypatch, folder, recipe, "eval") == 0
    rewards = read_json(out / "eval/rewards.json")
    k, num_benchmarks = (128 if "countdown" in recipe else 8), NUM_BENCHMARKS[recipe.rpartition("-")[2]]
    assert len(rewards) == num_benchmarks and all(len(of) == k for of in rewards.values())
    written = [row for file in (out / "eval/samples").glob("*.jsonl") for row in rows(file)]
    assert len(written) == num_benchmarks * k
    results = read_json(out / "eval/results.json")
    for question in rewards:
        assert results[f"eval/{question.partition('/')[0]}/response_tokens"] > 0
