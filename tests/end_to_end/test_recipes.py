"""Every shipped config parses, and its objects can be made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from sdzero.cli.stage_commands import collect_parser
from sdzero.pipeline.stages import stages

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipes").iterdir())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_recipe_is_whole_and_points_at_its_own_run(recipe: Path) -> None:
    """Standing alone, each stage reads what the stage before it writes under runs/RECIPE."""
    plan = stages(recipe, Path("runs") / recipe.name)
    for stage in plan:
        text = stage.config.read_text()
        config = yaml.safe_load(text)
        assert config["seed_everything"] == 0
        for key, path in stage.inputs.items():
            node = config
            for part in key.split("."):
                node = node[part]
            if stage.command != "test":
                assert str(path) == node, (stage.name, key)
        assert f"runs/{recipe.name}" in text


@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in RECIPES if not (recipe / "plan.yaml").is_file()],  # the others ask the hub
    ids=lambda p: p.name,
)
def test_collect_config(recipe: Path) -> None:
    parser = collect_parser()
    made = parser.instantiate(parser.parse_args(["--config", str(recipe / "collect.yaml")]))
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
