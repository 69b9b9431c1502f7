"""Questions, generations and tokens of each stage, counted as table 3 and appendix C.2 do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sdzero.pipeline.dry_run.assumptions import Assumptions, Config

LIGHTNINGS_EPOCHS = 1000
"""What Lightning takes where neither max_epochs nor max_steps is set."""


@dataclass(frozen=True)
class Budget:
    """What a stage asks for. None: only a run would tell.

    Attributes:
        stage: name of the stage.
        questions: different ones; of SRT its traces, of validation those of one.
        generations: responses sampled.
        tokens_sampled: in these.
        tokens_trained: as `Method.num_trained` counts them, over all epochs.
        at_most: the figures are upper bounds.
        evaluates: the stage's responses train nothing: they are counted apart.
    """

    stage: str
    questions: int | None
    generations: int | None
    tokens_sampled: int | None
    tokens_trained: int = 0
    at_most: bool = False
    evaluates: bool = False


@dataclass(frozen=True)
class Passes:
    """How often a training sees its items.

    Attributes:
        steps: optimizer steps.
        items: items seen, each as often as it is.
        per_epoch: steps of one epoch.
    """

    steps: int
    items: int
    per_epoch: int


def budgets(configs: Mapping[str, Config], assumptions: Assumptions | None) -> list[Budget]:
    """The stages' budgets in order, validation on the way as a row of its own. A base that is trained first has none.

    Raises:
        ValueError: a training has no end.
    """
    rows: list[Budget] = []
    for stage, config in configs.items():
        if stage == "collect":
            rows.append(_collect(config, assumptions))
        elif stage == "srt":
            row, passes = srt(configs["collect"], config, assumptions)
            rows += [row, *_validation(stage, config, passes, assumptions)]
        elif stage == "self_distill":
            row, passes = self_distill(config, assumptions)
            rows += [row, *_validation(stage, config, passes, assumptions)]
        elif stage.endswith("/eval"):
            rows.append(_evaluation(stage, config, 1, assumptions, assumptions and assumptions.eval_questions))
    return rows


def one_epoch(configs: Mapping[str, Config], assumptions: Assumptions | None) -> list[Budget]:
    """Appendix C.2's count: collection, and each training for one epoch."""

    def once(stage: str) -> Config:
        return {**configs[stage], "trainer": {**configs[stage]["trainer"], "max_epochs": 1, "max_steps": -1}}

    phase1 = [_collect(configs["collect"], assumptions)] if "collect" in configs else []
    phase1 += [srt(configs["collect"], once("srt"), assumptions)[0]] if "srt" in configs else []
    return [*phase1, self_distill(once("self_distill"), assumptions)[0]]


def _collect(config: Config, assumptions: Assumptions | None) -> Budget:
    firsts = config["num_questions"] * config["num_initial"]
    generations = firsts * (1 + config["num_revisions"])
    tokens = generations * (assumptions.mean_response_tokens if assumptions else config["sampling"]["max_new_tokens"])
    return Budget("collect", config["num_questions"], generations, tokens, at_most=assumptions is None)


def num_traces(config: Config, assumptions: Assumptions | None) -> tuple[int, bool]:
    """Traces that `sdzero collect` writes, and whether that is an upper bound: a revision for each of them at least."""
    revisions = config["num_questions"] * config["num_initial"] * config["num_revisions"]
    if config["branches"] == "incorrect" and assumptions and assumptions.correct_share:
        revisions = round(revisions * (1 - assumptions.correct_share))
    wanted = config["num_traces"]
    return (revisions, True) if wanted is None else (min(wanted, revisions), False)


def srt(collect: Config, config: Config, assumptions: Assumptions | None) -> tuple[Budget, Passes]:
    """L_revision reads y_revised, L_generation y_init, P_r and y_revised; P_r's few tokens are left out, as in C.2."""
    traces, at_most = num_traces(collect, assumptions)
    length = assumptions.mean_response_tokens if assumptions else collect["sampling"]["max_new_tokens"]
    passes = count_passes("srt", config, traces, config["data"]["init_args"]["traces_per_step"])
    at_most = at_most or assumptions is None
    return Budget("srt", traces, 0, 0, 3 * length * passes.items, at_most), passes


def self_distill(config: Config, assumptions: Assumptions | None) -> tuple[Budget, Passes]:
    """Each response is read by the student and by the teacher."""
    data = config["data"]["init_args"]
    passes = count_passes("self_distill", config, data["num_questions"], data["prompts_per_step"])
    generations = passes.items * data["rollouts_per_prompt"]
    length = assumptions.phase2_response_tokens if assumptions else data["sampling"]["max_new_tokens"]
    tokens = generations * length
    return Budget("self_distill", data["num_questions"], generations, tokens, 2 * tokens, at_most=True), passes


def _evaluation(
    stage: str, config: Config, times: int, assumptions: Assumptions | None, all_of_it: int | None
) -> Budget:
    evaluation = config["data"]["init_args"]["evaluation"]
    questions = all_of_it if evaluation["num_questions"] is None else evaluation["num_questions"]
    if questions is None:
        return Budget(stage, None, None, None, evaluates=True)
    generations = times * questions * (evaluation["num_samples"] + evaluation["num_revised"])
    length = evaluation["sampling"]["max_new_tokens"]
    if assumptions:  # an answer of SRT's model is as long as those that phase 2 starts from
        is_srt = stage.startswith("srt")
        length = assumptions.phase2_response_tokens if is_srt else assumptions.mean_response_tokens
    return Budget(stage, questions, generations, generations * length, at_most=assumptions is None, evaluates=True)


def _validation(stage: str, config: Config, passes: Passes, assumptions: Assumptions | None) -> list[Budget]:
    if config["data"]["init_args"]["evaluation"]["num_questions"] == 0:
        return []
    return [_evaluation(f"{stage} (validation)", config, count_validations(config, passes), assumptions, None)]


def count_passes(stage: str, config: Config, num_items: int, per_step: int) -> Passes:
    """Steps and items of a training; the last batch of an epoch may be short.

    Raises:
        ValueError: neither max_epochs nor max_steps ends it.
    """
    trainer = config["trainer"]
    epochs, steps = trainer["max_epochs"], trainer["max_steps"]
    if epochs is None and steps == -1:
        epochs = LIGHTNINGS_EPOCHS
    per_epoch = math.ceil(num_items / per_step)
    limits = [*([epochs * per_epoch] if epochs not in (None, -1) else []), *([steps] if steps != -1 else [])]
    if not limits:
        raise ValueError(f"{stage}.yaml: trainer.max_epochs and trainer.max_steps give the training no end: set one")
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
