"""A recipe's stages as the dry run sees them: by where their training items come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdzero.utils.recipe import QUESTION_IDS, Recipe, StageEntry

Config = Mapping[str, Any]
"""A stage's whole config, with all defaults."""

Kind = Literal["collection", "traces", "rollouts", "evaluation", "other"]


@dataclass(frozen=True)
class DryStage:
    """A stage or an evaluation.

    Attributes:
        name: its name.
        file: its file in the recipe's folder.
        kind: `collection`; a training on a collection's `traces` or on `rollouts` of its own policy; `evaluation`; or
            a training on something `other`, which is not modelled.
        config: its whole config.
        collection: config of the collection whose traces it trains on, or None.
        learned_to_revise: its model was trained on such traces, so that responses are as long as in phase 2.
    """

    name: str
    file: str
    kind: Kind
    config: Config
    collection: Config | None
    learned_to_revise: bool

    @property
    def data(self) -> Config:
        """The arguments of its data module; of a collection all of them."""
        return self.config if self.kind == "collection" else self.config["data"]["init_args"]


def dry_stages(recipe: Recipe, configs: Mapping[str, Config]) -> list[DryStage]:
    """Stages and evaluations of a recipe, in order.

    Args:
        recipe: the recipe.
        configs: whole configs by stage.
    """
    commands = {entry.name: entry.command for entry in recipe.entries}

    def source(entry: StageEntry) -> Config | None:
        parts = (taken.partition("/") for taken in entry.takes.values())
        names = (name for name, _, file in parts if file != QUESTION_IDS and commands[name] == "collect")
        return next((configs[name] for name in names), None)

    stages: list[DryStage] = []
    for entry in recipe.entries:
        collection = source(entry)
        if entry.trains:
            kind = _kind(entry, configs[entry.name], collection)
            stages.append(
                DryStage(entry.name, entry.file, kind, configs[entry.name], collection, collection is not None)
            )
        if entry.has_model:
            name, config = entry.evaluation, configs[entry.evaluation]
            stages.append(DryStage(name, recipe.evaluation, "evaluation", config, None, collection is not None))
    return stages


def _kind(entry: StageEntry, config: Config, collection: Config | None) -> Kind:
    if entry.command == "collect":
        return "collection"
    data = config["data"]["init_args"]
    if "prompts_per_step" in data:
        return "rollouts"
    return "traces" if collection is not None and "traces_per_step" in data else "other"
