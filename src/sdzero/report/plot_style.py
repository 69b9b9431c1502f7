"""One look for all figures. They are drawn for light and dark pages alike: ink and colours are told apart by name."""

from __future__ import annotations

from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"
"""Text, axes, grid lines and marks. A page may put its own text colour in its place."""

COLORS = {"base": "#808080", "srt": "#e69f00", "self_distill": "#0072b2", "r0": "#d55e00", "r1": "#009e73"}
"""Colours of the models and of the rewards, of Okabe and Ito's palette, which colour-blind people can tell apart."""


def new_figure(
    num_rows: int = 1, num_columns: int = 1, width: float = 8.0, height: float = 3.2
) -> tuple[Figure, list[Axes]]:
    """A transparent figure of `width` x `height` inches and its axes, row by row. No pyplot, no global state."""
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
    """Title and axis labels, in ink."""
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)


def legend(axes: Axes, place: Any = "best", handles: list[Artist] | None = None) -> None:
    """The legend, in ink and without a frame; of what is drawn, or of `handles`."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        axes.legend(handles=handles, loc=place, frameon=False, fontsize=8, labelcolor=INK)


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend of one of a figure's panels, in a row below all of them."""
    handles = axes.get_legend_handles_labels()[0]
    if handles:
        place = "outside lower center"
        figure.legend(handles=handles, loc=place, ncols=len(handles), frameon=False, fontsize=8, labelcolor=INK)


def say_empty(axes: Axes, why: str) -> None:
    """What a panel without anything to draw says instead."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=INK, fontsize=9, wrap=True)
