"""Common style of all plots, for light and dark pages: a page can replace every colour by its name."""

from __future__ import annotations

from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"
"""Text, axes, grid lines and marks; pages replace it by their text colour."""

MODEL_COLORS = ("#808080", "#e69f00", "#0072b2", "#cc79a7", "#56b4e9", "#b8a100")
"""Colours of the models by their order, repeated after the last; after Okabe and Ito, safe for colour-blind readers."""

REWARD_COLORS = {0: "#d55e00", 1: "#009e73"}


def new_figure(
    num_rows: int = 1, num_columns: int = 1, width: float = 8.0, height: float = 3.2
) -> tuple[Figure, list[Axes]]:
    """Create a transparent figure of `width` x `height` inches and its axes, row by row, without pyplot's state."""
    figure = Figure((width, height), layout="constrained", facecolor="none")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat:
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(which="both", colors=INK, labelsize=8)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, list(grid.flat)


def label(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    """Set title and axis labels."""
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)


def legend(axes: Axes, place: Any = "best", handles: list[Artist] | None = None) -> None:
    """Add a legend of `handles`, by default of everything plotted; none where nothing has a label."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        axes.legend(handles=handles, loc=place, frameon=False, fontsize=8, labelcolor=INK)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Add the legend of one panel in a row below all panels."""
    handles = axes.get_legend_handles_labels()[0]
    if handles:
        place, columns = "outside lower center", min(len(handles), 6)
        figure.legend(handles=handles, loc=place, ncols=columns, frameon=False, fontsize=8, labelcolor=INK)


def mark_empty(axes: Axes, reason: str) -> None:
    """Show why a panel is empty."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=INK, fontsize=9, wrap=True)
