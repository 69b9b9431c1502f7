"""Every shipped config parses, and its objects can be made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from sdzero.cli.stage_commands import check_stage, collect_parser
from sdzero.pipeline.stages import list_stages, parse
from sdzero.utils.recipe import load_recipe
from sdzero.utils.yaml_config import flatten

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipes").iterdir())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_every_stage_of_a_recipe_parses(recipe: Path) -> None:
    """With one seed, and with nothing in it that the recipe derives."""
    stages = list_stages(load_recipe(recipe), Path("runs") / recipe.name)
    assert parse(stages, check_stage).keys() == {stage.name for stage in stages}
    for stage in stages:
        assert stage.settings["seed_everything"] == 0
        assert not {"out", "trainer.default_root_dir"} & flatten(stage.settings).keys()
    for file in recipe.glob("*.yaml"):
        assert f"runs/{recipe.name}" not in file.read_text() or file.name == "opsd.yaml"


@pytest.mark.parametrize("recipe", [r for r in RECIPES if len(load_recipe(r).layers) == 1], ids=lambda p: p.name)
def test_the_task_of_a_collection_can_be_made(recipe: Path) -> None:
    """The recipes that extend the paper's folder ask the hub."""
    parser = collect_parser()
    stages = {stage.name: stage for stage in list_stages(load_recipe(recipe), Path("runs"))}
    made = parser.instantiate(parser.parse_args(["--config", stages["collect"].to_yaml()]))
    assert made.num_questions > 0 and made.task.questions("phase1", 2)


@pytest.mark.parametrize("name", ["cpu", "gpu", "fsdp2", "fsdp"])
def test_trainer_overlay(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"trainer/{name}.yaml").read_text())["trainer"]
    assert config["precision"] in ("32-true", "bf16-mixed")
    if "strategy" in config:
        parser = ArgumentParser()
        parser.add_subclass_arguments((FSDPStrategy, ModelParallelStrategy), "strategy")
        strategy = parser.instantiate(parser.parse_object({"strategy": config["strategy"]})).strategy
        assert isinstance(strategy, FSDPStrategy if name == "fsdp" else ModelParallelStrategy)
