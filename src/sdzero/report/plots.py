"""Plots of a run, each from a frame or the run's folder. A panel without data shows why it is empty."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sdzero.report import first_wrong, phases
from sdzero.report import localization as stats
from sdzero.report.evaluations import revision_metrics
from sdzero.report.plot_style import (
    INK,
    MODEL_COLORS,
    REWARD_COLORS,
    label,
    legend,
    legend_below,
    mark_empty,
    new_figure,
)
from sdzero.report.run_folder import RunFolder
from sdzero.utils.recipe import Model

REWARDS = {0: "r=0 (wrong)", 1: "r=1 (right)"}
PALE = 0.4  # opacity of what a value is compared with: first attempts, a second answer instead of a revision
ERROR_BARS = {"ecolor": INK, "elinewidth": 1.0}
NO_KL = "no token KL was recorded"
NOT_LOGGED = "not logged in this run"


def model_colors(run: RunFolder) -> dict[str, str]:
    """Return the colours of a run's models by name."""
    return {model.name: MODEL_COLORS[i % len(MODEL_COLORS)] for i, model in enumerate(run.models)}


def bucket_curve(frame: pd.DataFrame) -> Figure:
    """Plot figure 4, left: mean KL in 20 equal buckets of each response's tokens, the largest first."""
    return _plot_by_reward(
        stats.bucket_curve(frame), "KL of a response's tokens, sorted", "tokens, largest KL first (%)"
    )


def kl_by_position(frame: pd.DataFrame) -> Figure:
    """Plot the mean KL from the beginning of a response to its end."""
    return _plot_by_reward(stats.position_curve(frame), "KL along a response", "position in the response (%)")


def _plot_by_reward(curve: pd.DataFrame, title: str, x_label: str) -> Figure:
    """Plot a line for each reward, with a band of one standard error."""
    figure, (axes,) = new_figure(width=6)
    label(axes, title, x_label, "KL (nats)")
    if not len(curve):
        mark_empty(axes, NO_KL)
        return figure
    for reward in curve["reward"].unique():
        group = curve.query(f"reward == {reward}")
        x, name = 100 * (group["bucket"] - 0.5) / stats.NUM_BUCKETS, f"{REWARDS[reward]}, {group['responses'].iloc[0]}"
        _plot_with_band(axes, x, group["mean"], group["se"], REWARD_COLORS[reward], f"{name} responses")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def _plot_with_band(axes: Axes, x: Any, mean: Any, error: Any, color: str, name: str) -> None:
    """Plot a line with a band of one standard error."""
    axes.plot(x, mean, color=color, marker="o", markersize=3, label=name)
    error = error.fillna(0)
    axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def localization(frame: pd.DataFrame) -> Figure:
    """Plot how often the largest KL marks the first wrong step, and the KL by kind of token, for a task with steps."""
    figure, (left, right) = new_figure(1, 2, width=9, height=2.6)
    hits, kinds = first_wrong.hits(frame), first_wrong.by_kind(frame)
    label(left, "Largest in its attempt at the first wrong token", "wrong responses (%)")
    label(right, "Mean KL by kind of token", "KL (nats)")
    if not len(hits):
        for axes in (left, right):
            mark_empty(axes, "no wrong response with a known first wrong step")
        return figure
    signals = [*hits["signal"], "a random result", "a random token"]
    shares = [*hits["hit"], hits["chance_result"].iloc[0], hits["chance"].iloc[0]]
    _plot_bars(left, signals, [100 * share for share in shares], [100 * error for error in [*hits["hit_se"], 0, 0]])
    for patch in left.patches[len(hits) :]:
        patch.set_alpha(PALE)
    _plot_bars(right, kinds["kind"], kinds["kl"], kinds["kl_se"])
    return figure


def _plot_bars(axes: Axes, names: Any, values: Any, errors: Any) -> None:
    """Plot horizontal bars, the first on top."""
    axes.barh(names, values, xerr=errors, color=REWARD_COLORS[0], height=0.6, error_kw=ERROR_BARS)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)


def dynamics(run: RunFolder) -> Figure:
    """Plot figure 6, right: response length and revision phrases over all trainings.

    A model is one unit to the right of the model it starts from, however many steps its training has.
    """
    figure, (left, right) = new_figure(1, 2, width=9)
    depths: dict[str, int] = {}
    for model in run.models:  # after the one that it starts from
        parent = run.parent(model)
        depths[model.name] = 1 + depths[parent.name] if parent else 0
    steps = {model.name: phases.num_steps(run, model.name) for model in run.models}
    trained = [[m for m in run.models if depths[m.name] == depth] for depth in sorted({*depths.values()} - {0})]
    names = [" / ".join(model.label for model in models) for models in trained]
    ends = [" / ".join(map(str, sorted({steps[model.name] for model in models}))) for models in trained]
    ticks = ["0", *(f"{end} | 0" for end in ends[:-1]), *ends[-1:]]
    for axes, tag, rollout, title, unit in (
        (left, "response_tokens", "length", "Response length", "tokens"),
        (right, "keywords_per_response", "keywords_per_response", "Revision phrases", "per response"),
    ):
        label(axes, title, " | ".join(f"steps of {name}" for name in names), unit)
        curve = phases.over_phases(run, tag, rollout)
        x = [max(0, depths[m] - 1) + s / max(1, steps[m]) for m, s in zip(curve["model"], curve["step"], strict=True)]
        _plot_phases(axes, run, curve.assign(x=x))
        for depth in range(1, len(trained)):
            axes.axvline(depth, color=INK, linestyle=":", linewidth=1)
        axes.set_xticks(range(len(ticks)), ticks)
    legend_below(figure, left)
    return figure


def last_models(run: RunFolder) -> list[Model]:
    """Return the trained models from which no other model starts."""
    sources = {model.starts_from for model in run.models}
    return [model for model in run.models if run.parent(model) and model.name not in sources]


def evolution(run: RunFolder) -> Figure:
    """Plot figure 5: accuracy over the steps of the last training (or trainings), with the teacher's updates."""
    figure, (axes,) = new_figure(width=6.5)
    curve = phases.over_phases(run, "avg_at_k", "reward")
    models = last_models(run)
    parts = [curve.head(0)]
    for model in models:
        parent = run.parent(model)
        assert parent is not None
        starts = curve[(curve["model"] == parent.name) & (curve["kind"] == "evaluation")]
        parts += [starts.assign(step=0), curve[curve["model"] == model.name]]
    shown = pd.concat(parts).drop_duplicates()
    label(axes, "Accuracy in training", "steps of " + " / ".join(model.label for model in models), "accuracy")
    _plot_phases(axes, run, shown.assign(x=shown["step"]))
    syncs = [(model, step) for model in models for step in phases.teacher_syncs(run, model.name)]
    for i, (model, step) in enumerate(syncs):
        color = INK if len(models) == 1 else model_colors(run)[model.name]
        axes.axvline(step, color=color, linestyle="--", linewidth=1, label="" if i else "new teacher")
    legend_below(figure, axes)
    return figure


def _plot_phases(axes: Axes, run: RunFolder, curve: pd.DataFrame) -> None:
    """Plot over `x`: evaluations as diamonds, joined to those of the model that they start from; validations as a line
    with a band of one standard error; rollouts thin."""
    if not len(curve):
        return mark_empty(axes, NOT_LOGGED)
    evaluations = curve[curve["kind"] == "evaluation"].groupby("model").first()
    colors = model_colors(run)
    for model in run.models:
        color, of_model = colors[model.name], curve.query(f"model == '{model.name}'")
        evaluation, validations, rollouts = (
            of_model.query(f"kind == '{kind}'") for kind in ("evaluation", "validation", "rollout")
        )
        if {model.name, model.starts_from} <= {*evaluations.index}:
            ends = evaluations.loc[[model.starts_from, model.name]]
            axes.plot(ends["x"], ends["value"], color=INK, alpha=PALE, linewidth=0.8)
        if len(rollouts):
            name = f"{model.label}, rollouts"
            axes.plot(rollouts["x"], rollouts["value"], color=color, alpha=PALE, linewidth=1, label=name)
        if len(validations):
            name = f"{model.label}, validation"
            _plot_with_band(axes, validations["x"], validations["value"], validations["se"], color, name)
        if len(evaluation):
            marks = {"color": color, "marker": "D", "markersize": 6, "linestyle": ""}
            axes.errorbar(evaluation["x"], evaluation["value"], evaluation["se"], **marks, label=model.label)


def revision_bars(run: RunFolder) -> Figure:
    """Plot figure 3: first attempts and their revisions by model, beside a plain second answer."""
    figure, panels = new_figure(2, 2, height=5)
    metrics = revision_metrics(run)
    colors = [model_colors(run)[model.name] for model in run.models if model.label in metrics.index]
    for axes, title, unit, (pale, full), (pale_name, full_name) in (
        (panels[0], "Accuracy", "%", ("revise_acc1", "revise_acc2"), ("first attempt", "revised")),
        (panels[1], "Tokens", "", ("revise_tokens1", "revise_tokens2"), ("first attempt", "revised")),
        (panels[2], "Wrong first attempts corrected", "%", _both("wrong_to_right_rate"), ("resampled", "revised")),
        (panels[3], "Right first attempts broken", "%", _both("right_to_wrong_rate"), ("resampled", "revised")),
    ):
        label(axes, title, y=unit)
        if metrics.reindex(columns=[pale, full]).isna().all(axis=None):
            mark_empty(axes, NOT_LOGGED)
            continue
        scale = 100 if unit else 1
        for shift, name, alpha in ((-0.2, pale, PALE), (0.2, full, 1.0)):
            places = [place + shift for place in range(len(metrics))]
            errors = scale * metrics[f"{name}_se"] if f"{name}_se" in metrics else None
            axes.bar(places, scale * metrics[name], 0.38, color=colors, alpha=alpha, yerr=errors, error_kw=ERROR_BARS)
        axes.set_xticks(range(len(metrics)), metrics.index.tolist())
        axes.margins(y=0.3)  # room for the legend
        names = ((pale_name, PALE), (full_name, 1.0))
        legend(axes, "upper left", [Patch(color=INK, alpha=alpha, label=name) for name, alpha in names])
    return figure


def _both(rate: str) -> tuple[str, str]:
    return f"resample_{rate}", f"revise_{rate}"


def training_curves(run: RunFolder) -> Figure:
    """Plot the losses of each training, and reward, gradient norm, learning rate and log-probability gap of all."""
    panels = _training_panels(run)
    num_rows = -(-len(panels) // 3)
    figure, grid = new_figure(num_rows, 3, width=10, height=2.5 * num_rows)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        label(axes, title, "step")
        logged = [(line, points) for line in lines if (points := run.scalars(*line[:2]))]
        if not logged:
            mark_empty(axes, NOT_LOGGED)
        for (_, tag, name, color, style), points in logged:
            curve = pd.Series(dict(points))
            window = 1 if tag == "train/lr" else 1 + len(curve) // 25
            axes.plot(curve, color=color, alpha=0.25, linewidth=0.8)  # noisy values, below their running mean
            mean = curve.rolling(window, center=True, min_periods=1).mean()
            axes.plot(mean, color=color, linestyle=style, label=name)
        if len(logged) > 1:
            legend(axes)
    return figure


def _training_panels(run: RunFolder) -> dict[str, list[tuple[str, str, str, str, str]]]:
    """List the lines of each panel as stage, tag, name, colour and style: the losses of every model that started from
    another, then metrics of all."""
    trained = [model for model in run.models if run.parent(model)]
    colors = model_colors(run)
    panels: dict[str, list[tuple[str, str, str, str, str]]] = {}
    for model in trained:
        name, color = model.name, colors[model.name]
        terms = [tag for tag in run.tags(name) if tag.startswith("train/loss_")]
        panels[f"{model.label}: loss"] = [
            (name, "train/loss", "loss", color, "-"),
            *((name, tag, tag.removeprefix("train/loss_"), color, ("--", ":")[i % 2]) for i, tag in enumerate(terms)),
            *((name, f"teacher/kl_r{r}", f"KL, {REWARDS[r]}", REWARD_COLORS[r], "-") for r in REWARDS),
        ]
    for title, tag in (
        ("Reward of rollouts", "rollout/reward"),
        ("Gradient norm", "train/grad_norm"),
        ("Learning rate", "train/lr"),
        ("Log-prob. gap of engine and trainer", "rollout/logprob_gap"),
    ):
        panels[title] = [(model.name, tag, model.label, colors[model.name], "-") for model in trained]
    return panels
