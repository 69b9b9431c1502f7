"""The figures, each from a frame or a run's folder. What a run did not log is said in the figure's place."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdzero.analysis import localization as stats
from sdzero.analysis.run import RunFolder
from sdzero.analysis.style import COLORS, INK, label, legend, new_figure, say_empty

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

REWARDS = {0: ("r0", "r = 0, wrong"), 1: ("r1", "r = 1, right")}


def _draw_curves(axes: Axes, curve: pd.DataFrame) -> None:
    """A line with its band of one standard error for each reward."""
    if not len(curve):
        return say_empty(axes, "no token KL was recorded")
    num_buckets = curve["bucket"].max()
    for reward, group in curve.groupby("reward"):
        color, name = REWARDS[int(str(reward))]
        x, mean, se = 100 * (group["bucket"] - 0.5) / num_buckets, group["mean"], group["se"].fillna(0)
        axes.plot(
            x, mean, color=COLORS[color], marker="o", markersize=3, label=f"{name} ({group['responses'].iloc[0]})"
        )
        axes.fill_between(x, mean - se, mean + se, color=COLORS[color], alpha=0.2, linewidth=0)
    axes.set_xlim(0, 100)
    legend(axes)


def bucket_curve(frame: pd.DataFrame) -> Figure:
    """Figure 4, left: mean KL in 20 equal buckets of a response's tokens, the largest first."""
    figure, (axes,) = new_figure(width=6)
    _draw_curves(axes, stats.bucket_curve(frame))
    label(axes, "KL of a response's tokens, sorted", "tokens, largest KL first (%)", "KL (nats)")
    return figure


def kl_by_position(frame: pd.DataFrame) -> Figure:
    """Mean KL over the course of a response."""
    figure, (axes,) = new_figure(width=6)
    _draw_curves(axes, stats.position_curve(frame))
    label(axes, "KL along a response", "position in the response (%)", "KL (nats)")
    return figure


def localization(frame: pd.DataFrame) -> Figure:
    """Where the largest KL falls against the first wrong step, for a task that knows it."""
    figure, (axes,) = new_figure()
    say_empty(axes, "soon")
    return figure


def dynamics(run: RunFolder) -> Figure:
    """Figure 6, right: response length and revision phrases over both phases."""
    figure, (axes,) = new_figure()
    say_empty(axes, "soon")
    return figure


def evolution(run: RunFolder) -> Figure:
    """Figure 5: accuracy over the steps of self-distillation, with the teacher's synchronisations."""
    figure, (axes,) = new_figure()
    say_empty(axes, "soon")
    return figure


def revision_bars(run: RunFolder) -> Figure:
    """Figure 3: first attempts and their revisions, accuracy and tokens, of each model."""
    figure, (axes,) = new_figure()
    say_empty(axes, "soon")
    return figure


def training_curves(run: RunFolder) -> Figure:
    """Loss terms, gradient norm, learning rate, reward and log-probability gap of both phases."""
    figure, (axes,) = new_figure()
    say_empty(axes, "soon")
    return figure
