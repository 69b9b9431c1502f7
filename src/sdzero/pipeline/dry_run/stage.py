"""A recipe's stages by the source of their training items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdzero.utils.recipe import QUESTION_IDS, Recipe

Config = Mapping[str, Any]
"""A stage's whole config, with all defaults."""

Kind = Literal["collection", "traces", "rollouts", "evaluation", "other"]


@dataclass(frozen=True)
class DryStage:
    """A stage or an evaluation.

    Its kind is `collection`; a training on a collection's `traces` or on `rollouts` of its own policy; `evaluation`; or
    a training on something `other`, which is not modelled.
    """

    name: str
    file: str  # in the recipe's folder
    kind: Kind
    config: Config
    collection: Config | None  # config of the collection whose traces it trains on
    learned_to_revise: bool  # its model was trained on such traces: responses are as long as in phase 2

    @property
    def data(self) -> Config:
        """Arguments of its data module; of a collection all of them."""
        return self.config if self.kind == "collection" else self.config["data"]["init_args"]


def dry_stages(recipe: Recipe, configs: Mapping[str, Config]) -> list[DryStage]:
    """List the stages and evaluations of a recipe in order, with their whole configs by name."""
    commands = {entry.name: entry.command for entry in recipe.entries}
    stages: list[DryStage] = []
    for entry in recipe.entries:
        taken = (source.partition("/") for source in entry.takes.values())
        names = (name for name, _, file in taken if file != QUESTION_IDS and commands[name] == "collect")
        collection = next((configs[name] for name in names), None)
        revises = collection is not None
        if entry.trains:
            config = configs[entry.name]
            kind = _kind(entry.command, config, revises)
            stages.append(DryStage(entry.name, entry.file, kind, config, collection, revises))
        if entry.has_model:
            name = entry.evaluation
            stages.append(DryStage(name, recipe.evaluation, "evaluation", configs[name], None, revises))
    return stages


def _kind(command: str, config: Config, takes_traces: bool) -> Kind:
    if command == "collect":
        return "collection"
    data = config["data"]["init_args"]
    if "prompts_per_step" in data:
        return "rollouts"
    return "traces" if takes_traces and "traces_per_step" in data else "other"
