"""The figures, each from a frame or a run's folder. What a run did not log is said in the panel's place."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sdzero.report import first_wrong, phases, revision
from sdzero.report import localization as stats
from sdzero.report.plot_style import COLORS, INK, label, legend, legend_below, new_figure, say_empty
from sdzero.report.run_folder import MODELS, RunFolder

__all__ = [
    "COLORS",
    "INK",
    "bucket_curve",
    "dynamics",
    "evolution",
    "kl_by_position",
    "localization",
    "revision_bars",
    "training_curves",
]

REWARDS = {0: "r=0 (wrong)", 1: "r=1 (right)"}
PALE = 0.4  # of what a figure compares with: first attempts, a second answer instead of a revision
ERROR_BARS = {"ecolor": INK, "elinewidth": 1.0}
NO_KL = "no token KL was recorded"


def bucket_curve(frame: pd.DataFrame) -> Figure:
    """Figure 4, left: mean KL in 20 equal buckets of each response's tokens, the largest first."""
    figure, (axes,) = new_figure(width=6)
    label(axes, "KL of a response's tokens, sorted", "tokens, largest KL first (%)", "KL (nats)")
    _draw_by_reward(axes, stats.bucket_curve(frame))
    return figure


def kl_by_position(frame: pd.DataFrame) -> Figure:
    """Mean KL from the beginning of a response to its end."""
    figure, (axes,) = new_figure(width=6)
    label(axes, "KL along a response", "position in the response (%)", "KL (nats)")
    _draw_by_reward(axes, stats.position_curve(frame))
    return figure


def _draw_by_reward(axes: Axes, curve: pd.DataFrame) -> None:
    """A line for each reward, with a band of one standard error."""
    if not len(curve):
        return say_empty(axes, NO_KL)
    for reward in curve["reward"].unique():
        group = curve.query(f"reward == {reward}")
        x, mean, error = 100 * (group["bucket"] - 0.5) / stats.NUM_BUCKETS, group["mean"], group["se"].fillna(0)
        color, count = COLORS[f"r{reward}"], group["responses"].iloc[0]
        axes.plot(x, mean, color=color, marker="o", markersize=3, label=f"{REWARDS[reward]}, {count} responses")
        axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    legend(axes)


def localization(frame: pd.DataFrame) -> Figure:
    """Where the largest KL falls against the first wrong step, for a task that knows its steps."""
    figure, (left, right) = new_figure(1, 2, width=9, height=2.6)
    hits, kinds = first_wrong.hits(frame), first_wrong.by_kind(frame)
    label(left, "Largest of an attempt at its first wrong token", "wrong responses (%)")
    label(right, "Mean KL by kind of token", "KL (nats)")
    if not len(hits):
        for axes in (left, right):
            say_empty(axes, "no wrong response with a known first wrong step")
        return figure
    signals = [*hits["signal"], "a random result", "a random token"]
    shares = [*hits["hit"], hits["chance_result"].iloc[0], hits["chance"].iloc[0]]
    _draw_bars(left, signals, [100 * share for share in shares], [100 * error for error in [*hits["hit_se"], 0, 0]])
    for patch in left.patches[len(hits) :]:
        patch.set_alpha(PALE)
    _draw_bars(right, kinds["kind"], kinds["kl"], kinds["kl_se"])
    return figure


def _draw_bars(axes: Axes, names: Any, values: Any, errors: Any) -> None:
    """Lying bars of figures of wrong responses, the first on top."""
    axes.barh(names, values, xerr=errors, color=COLORS["r0"], height=0.6, error_kw=ERROR_BARS)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)


def dynamics(run: RunFolder) -> Figure:
    """Figure 6, right: response length and revision phrases. Both phases are as wide, however many steps they have."""
    figure, (left, right) = new_figure(1, 2, width=9)
    num_srt, num_distill = (phases.num_steps(run, stage) for stage in ("srt", "self_distill"))
    for axes, tag, rollout, title, unit in (
        (left, "response_tokens", "length", "Response length", "tokens"),
        (right, "keywords_per_response", "keywords_per_response", "Revision phrases", "per response"),
    ):
        label(axes, title, "steps of SRT | steps of SelfDistill", unit)
        curve = phases.over_phases(run, tag, rollout)
        begins = curve["phase"].eq("self_distill")
        lengths = begins.map(lambda is_second: max(1, num_distill if is_second else num_srt))
        _draw_phases(axes, curve.assign(x=begins + curve["step"] / lengths))
        axes.axvline(1, color=INK, linestyle=":", linewidth=1)
        ticks = [f"{num_srt // 2}", f"{num_srt} | 0", f"{num_distill // 2}", f"{num_distill}"]
        axes.set_xticks([0, 0.5, 1, 1.5, 2], ["0", *ticks])
    legend_below(figure, left)
    return figure


def evolution(run: RunFolder) -> Figure:
    """Figure 5: accuracy over the steps of self-distillation, with the teacher's synchronisations."""
    figure, (axes,) = new_figure(width=6.5)
    label(axes, "Accuracy in SelfDistill", "steps of SelfDistill", "accuracy")
    curve = phases.over_phases(run, "avg_at_k", "reward")
    start = curve.query("phase == 'srt' and kind == 'evaluation'").assign(x=0)
    then = curve.query("phase == 'self_distill'").assign(x=lambda rows: rows["step"])
    _draw_phases(axes, pd.concat([start, then]))
    for i, step in enumerate(phases.teacher_syncs(run)):
        axes.axvline(step, color=INK, linestyle="--", linewidth=1, label="" if i else "new teacher")
    legend_below(figure, axes)
    return figure


def _draw_phases(axes: Axes, curve: pd.DataFrame) -> None:
    """Over `x`: evaluations as diamonds, validations as a line with a band of one standard error, rollouts thin."""
    if not len(curve):
        return say_empty(axes, "not logged in this run")
    evaluations = curve.query("kind == 'evaluation'")
    axes.plot(evaluations["x"], evaluations["value"], color=INK, alpha=PALE, linewidth=0.8)
    for phase, name in MODELS.items():
        color = COLORS[phase]
        evaluation, validations, rollouts = (
            curve.query(f"phase == '{phase}' and kind == '{kind}'") for kind in ("evaluation", "validation", "rollout")
        )
        if len(rollouts):
            axes.plot(rollouts["x"], rollouts["value"], color=color, alpha=PALE, linewidth=1, label="rollouts")
        if len(validations):
            x, value, error = validations["x"], validations["value"], validations["se"].fillna(0)
            axes.plot(x, value, color=color, marker="o", markersize=3, label=f"{name}, validation")
            axes.fill_between(x, value - error, value + error, color=color, alpha=0.2, linewidth=0)
        if len(evaluation):
            marks = {"color": color, "marker": "D", "markersize": 6, "linestyle": ""}
            axes.errorbar(evaluation["x"], evaluation["value"], evaluation["se"], **marks, label=name)


def revision_bars(run: RunFolder) -> Figure:
    """Figure 3: first attempts and their revisions by model, beside plainly sampling another answer."""
    figure, panels = new_figure(2, 2, height=5)
    figures = revision.revision_figures(run)
    for axes, title, unit, (pale, full), (pale_name, full_name) in (
        (panels[0], "Accuracy", "%", ("revise_acc1", "revise_acc2"), ("first attempt", "revised")),
        (panels[1], "Tokens", "", ("revise_tokens1", "revise_tokens2"), ("first attempt", "revised")),
        (panels[2], "Wrong first attempts mended", "%", _both("wrong_to_right_rate"), ("another answer", "revised")),
        (panels[3], "Right first attempts broken", "%", _both("right_to_wrong_rate"), ("another answer", "revised")),
    ):
        label(axes, title, y=unit)
        if figures.reindex(columns=[pale, full]).isna().all(axis=None):
            say_empty(axes, "not logged in this run")
            continue
        scale = 100 if unit else 1
        for shift, name, alpha in ((-0.2, pale, PALE), (0.2, full, 1.0)):
            places = [place + shift for place in range(len(figures))]
            errors = scale * figures[f"{name}_se"] if f"{name}_se" in figures else None
            colors = [COLORS[str(model)] for model in figures.index]
            axes.bar(places, scale * figures[name], 0.38, color=colors, alpha=alpha, yerr=errors, error_kw=ERROR_BARS)
        axes.set_xticks(range(len(figures)), [MODELS[str(model)] for model in figures.index])
        axes.margins(y=0.3)  # room for the legend
        names = ((pale_name, PALE), (full_name, 1.0))
        legend(axes, "upper left", [Patch(color=INK, alpha=alpha, label=name) for name, alpha in names])
    return figure


def _both(rate: str) -> tuple[str, str]:
    return f"resample_{rate}", f"revise_{rate}"


def training_curves(run: RunFolder) -> Figure:
    """Loss terms, KL by reward, reward, gradient norm, learning rate and log-probability gap, phase by phase."""
    figure, panels = new_figure(2, 3, width=10, height=5)
    for axes, (title, lines) in zip(panels, TRAINING.items(), strict=True):
        label(axes, title, "step")
        logged = [(line, points) for line in lines if (points := run.scalars(line.stage, line.tag))]
        if not logged:
            say_empty(axes, "not logged in this run")
        for line, points in logged:
            curve, color = pd.Series(dict(points)), COLORS[line.color]
            window = 1 if line.tag == "train/lr" else 1 + len(curve) // 25  # noisy ones faint, below a running mean
            axes.plot(curve, color=color, alpha=0.25, linewidth=0.8)
            mean = curve.rolling(window, center=True, min_periods=1).mean()
            axes.plot(mean, color=color, linestyle=line.style, label=line.name)
        if len(lines) > 1:
            legend(axes)
    return figure


class Line(NamedTuple):
    """A curve of a stage; the colour by its name in `COLORS`."""

    stage: str
    tag: str
    name: str
    color: str
    style: str = "-"


def _of_both(tag: str) -> list[Line]:
    return [Line("srt", tag, "SRT", "srt"), Line("self_distill", tag, "SelfDistill", "self_distill")]


TRAINING = {
    "SRT: loss": [
        Line("srt", "train/loss", "both terms", "srt"),
        Line("srt", "train/loss_generation", "generation", "srt", "--"),
        Line("srt", "train/loss_revision", "revision", "srt", ":"),
    ],
    "SelfDistill: KL to the reviser": [
        Line("self_distill", "train/loss", "loss", "self_distill"),
        Line("self_distill", "teacher/kl_r0", REWARDS[0], "r0"),
        Line("self_distill", "teacher/kl_r1", REWARDS[1], "r1"),
    ],
    "SelfDistill: reward of rollouts": [Line("self_distill", "rollout/reward", "reward", "self_distill")],
    "Gradient norm": _of_both("train/grad_norm"),
    "Learning rate": _of_both("train/lr"),
    "Log-prob. gap of engine and trainer": [Line("self_distill", "rollout/logprob_gap", "gap", "self_distill")],
}
"""The panels of `training_curves`."""
