"""Questions, generations and tokens of each stage, counted as table 3 and appendix C.2 do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sdzero.pipeline.dry_run.assumptions import Assumptions
from sdzero.utils.recipe import QUESTION_IDS, Recipe
from sdzero.utils.yaml_config import Config

DEFAULT_EPOCHS = 1000
"""Lightning's, where neither max_epochs nor max_steps is set."""

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


@dataclass(frozen=True)
class Budget:
    """Questions, generations and tokens of a stage. None: only a run would show it."""

    stage: str
    questions: int | None  # different ones; of a training on traces the traces, of validation those of one
    generations: int | None
    tokens_sampled: int | None  # in these generations
    tokens_trained: int = 0  # as `Method.num_trained` counts them, over all epochs
    at_most: bool = False  # the counts are upper bounds
    evaluates: bool = False  # nothing is trained on the responses; they are counted apart


@dataclass(frozen=True)
class Passes:
    """Length of a training."""

    steps: int  # optimizer steps
    items: int  # items processed, counting repeats
    per_epoch: int  # steps of one epoch


def budgets(stages: Iterable[DryStage], assumptions: Assumptions | None) -> list[Budget]:
    """Budgets of the stages in order, validation during training in a row of its own.

    Raises:
        ValueError: a training has no end.
    """
    rows: list[Budget] = []
    for stage in stages:
        if stage.kind == "collection":
            rows.append(_collection(stage, assumptions))
        elif stage.kind == "evaluation":
            all_of_it = assumptions.eval_questions if assumptions else None
            rows.append(_evaluation(stage, stage.name, 1, assumptions, all_of_it))
        elif stage.kind != "other":
            row, passes = training(stage, assumptions)
            rows.append(row)
            if stage.data["evaluation"]["num_questions"] != 0:
                times = count_validations(stage.config, passes)
                rows.append(_evaluation(stage, f"{stage.name} (validation)", times, assumptions, None))
    return rows


def one_epoch(stages: Iterable[DryStage], assumptions: Assumptions | None) -> list[Budget]:
    """Budgets as appendix C.2 counts them: collections, and each training for one epoch."""
    limits = {"max_epochs": 1, "max_steps": -1}
    once = [
        replace(stage, config={**stage.config, "trainer": {**stage.config.get("trainer", {}), **limits}})
        for stage in stages
    ]
    return [row for row in budgets(once, assumptions) if not row.evaluates]


def _collection(stage: DryStage, assumptions: Assumptions | None) -> Budget:
    config = stage.config
    firsts = config["num_questions"] * config["num_initial"]
    generations = firsts * (1 + config["num_revisions"])
    tokens = generations * (assumptions.mean_response_tokens if assumptions else config["sampling"]["max_new_tokens"])
    return Budget(stage.name, config["num_questions"], generations, tokens, at_most=assumptions is None)


def num_traces(config: Config, assumptions: Assumptions | None) -> tuple[int, bool]:
    """Traces that a collection keeps, and whether that is an upper bound."""
    revisions = config["num_questions"] * config["num_initial"] * config["num_revisions"]
    if config["branches"] == "incorrect" and assumptions and assumptions.correct_share:
        revisions = round(revisions * (1 - assumptions.correct_share))
    wanted = config["num_traces"]
    return (revisions, True) if wanted is None else (min(wanted, revisions), False)


def training(stage: DryStage, assumptions: Assumptions | None) -> tuple[Budget, Passes]:
    """Budget and passes of a training on traces or rollouts."""
    arguments, data = stage.config["model"]["init_args"], stage.data
    if stage.collection is not None and stage.kind == "traces":
        # L_revision reads y_revised, L_generation y_init, P_r and y_revised; the few tokens of P_r are left out, as in
        # C.2. Other losses read y_revised alone
        responses = 3 if "revision_weight" in arguments else 1
        traces, at_most = num_traces(stage.collection, assumptions)
        limit = stage.collection["sampling"]["max_new_tokens"]
        length = assumptions.mean_response_tokens if assumptions else limit
        passes = count_passes(stage.file, stage.config, traces, data["traces_per_step"])
        tokens = responses * length * passes.items
        return Budget(stage.name, traces, 0, 0, tokens, at_most or assumptions is None), passes
    passes = count_passes(stage.file, stage.config, data["num_questions"], data["prompts_per_step"])
    generations = passes.items * data["rollouts_per_prompt"]
    length = assumptions.phase2_response_tokens if assumptions else data["sampling"]["max_new_tokens"]
    tokens = generations * length
    readers = 2 if "context" in arguments else 1  # student and teacher
    return Budget(stage.name, data["num_questions"], generations, tokens, readers * tokens, at_most=True), passes


def _evaluation(
    stage: DryStage, name: str, times: int, assumptions: Assumptions | None, all_of_it: int | None
) -> Budget:
    evaluation = stage.data["evaluation"]
    questions = all_of_it if evaluation["num_questions"] is None else evaluation["num_questions"]
    if questions is None:
        return Budget(name, None, None, None, evaluates=True)
    generations = times * questions * (evaluation["num_samples"] + evaluation["num_revised"])
    length = evaluation["sampling"]["max_new_tokens"]
    if assumptions:
        revises = stage.learned_to_revise
        length = assumptions.phase2_response_tokens if revises else assumptions.mean_response_tokens
    return Budget(name, questions, generations, generations * length, at_most=assumptions is None, evaluates=True)


def count_passes(file: str, config: Config, num_items: int, per_step: int) -> Passes:
    """Steps and items of a training; the last batch of an epoch may be short.

    Raises:
        ValueError: neither max_epochs nor max_steps ends it.
    """
    trainer = config["trainer"]
    epochs, steps = trainer["max_epochs"], trainer["max_steps"]
    if epochs is None and steps == -1:
        epochs = DEFAULT_EPOCHS
    per_epoch = math.ceil(num_items / per_step)
    limits = [*([epochs * per_epoch] if epochs not in (None, -1) else []), *([steps] if steps != -1 else [])]
    if not limits:
        raise ValueError(f"{file}: trainer.max_epochs and trainer.max_steps give the training no end: set one")
    full, rest = divmod(min(limits), per_epoch)
    return Passes(min(limits), full * num_items + min(rest * per_step, num_items), per_epoch)


def count_validations(config: Config, passes: Passes) -> int:
    """As Lightning counts: every `val_check_interval` steps, or after every n-th epoch."""
    every, interval = config["trainer"]["check_val_every_n_epoch"], config["trainer"]["val_check_interval"]
    if every is None:
        return passes.steps // interval
    epochs, rest = divmod(passes.steps, passes.per_epoch)
    if interval is None:
        return epochs // every
    within = interval if isinstance(interval, int) else max(1, int(passes.per_epoch * interval))
    return epochs // every * (passes.per_epoch // within) + ((epochs + 1) % every == 0) * (rest // within)
