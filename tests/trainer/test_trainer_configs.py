"""Every config of configs/trainer lies over a recipe, and its strategy can be made, with or without a GPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.fsdp import ShardingStrategy

from sdzero.cli.stage_commands import check_stage
from sdzero.trainer.strategies import FSDP, FullShard
from support.runs import ROOT

CONFIGS = sorted(path.stem for path in (ROOT / "configs/trainer").glob("*.yaml"))
TWO_HOURS = timedelta(hours=2)
"""How long ranks wait for one whose responses take longer; torch's own limits are 10 and 30 minutes."""


def strategy_of(name: str) -> Any:
    """What the Trainer would make of it."""
    trainer = yaml.safe_load((ROOT / f"configs/trainer/{name}.yaml").read_text())["trainer"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=str | Strategy, default="auto")
    given = {"strategy": trainer["strategy"]} if "strategy" in trainer else {}
    return parser.instantiate(parser.parse_object(given)).strategy


@pytest.mark.parametrize("name", CONFIGS)
def test_it_lies_over_a_recipe(name: str) -> None:
    recipe, config = ROOT / "configs/recipes/qwen3-4b-math/self_distill.yaml", ROOT / f"configs/trainer/{name}.yaml"
    merged = check_stage("fit", ["--config", str(recipe), "--config", str(config)])
    own = yaml.safe_load(config.read_text())["trainer"]
    for key in ("accelerator", "devices", "precision"):
        assert key not in own or merged["trainer"][key] == own[key]


def test_strategies() -> None:
    assert strategy_of("cpu") == strategy_of("gpu") == "auto"
    ddp, fsdp, fsdp2, tp = map(strategy_of, ("ddp", "fsdp", "fsdp2", "tp"))
    assert isinstance(ddp, DDPStrategy) and isinstance(fsdp, FSDP)
    assert isinstance(fsdp2, FullShard) and isinstance(tp, FullShard)
    assert [strategy._timeout for strategy in (ddp, fsdp, fsdp2, tp)] == [TWO_HOURS] * 4
    assert ddp._ddp_kwargs["gradient_as_bucket_view"]
    assert fsdp.sharding_strategy == ShardingStrategy.FULL_SHARD and fsdp.writes_folders
    assert (fsdp2.tensor_parallel_size, tp.tensor_parallel_size) == (1, 4) and tp.writes_folders
