"""Responses with their tokens coloured by token KL reward (figure 4, right): HTML for notebooks, a figure elsewhere.

Red tokens are those that the reviser would take back, blue ones those to which it adds weight.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sdzero.report.plot_style import INK, new_figure, say_empty

TAKEN_BACK, ADDED_TO = "#d62728", "#1f77b4"
FULL_COLOR = 2.0  # nats; the colour of a larger token KL reward is as strong
STRONGEST = 0.75  # opacity of the strongest colour: the text stays readable on it, on light pages and dark ones
WIDTH = 90  # of a figure, in characters
FONT_SIZE = 9.0
NOTHING = "no such response was recorded"

Row = Mapping[Any, Any]


class TokenView:
    """Responses as a notebook shows them: HTML where it can, a picture where it cannot.

    Args:
        frame: rows of `RunFolder.token_kl`. A column `first_wrong` holds the indices of tokens to be framed, or None.
        full_color: token KL reward, in nats, from which a colour gets no stronger.
    """

    def __init__(self, frame: pd.DataFrame, full_color: float = FULL_COLOR) -> None:
        self.rows: list[Row] = list(frame.to_dict(orient="records"))
        framed = [row.get("first_wrong") for row in self.rows]
        self.framed = [None if i is None or math.isnan(i) else int(i) for i in framed]
        self.full_color = full_color

    def _repr_html_(self) -> str:
        shown = zip(self.rows, self.framed, strict=True)
        return "".join(token_html(row, framed, self.full_color) for row, framed in shown) or html.escape(NOTHING)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        figure = token_figure(self.rows, self.framed, self.full_color)
        figure.savefig(file, format="png", facecolor="white", dpi=120)
        return file.getvalue()


def token_html(row: Row, framed: int | None = None, full_color: float = FULL_COLOR) -> str:
    """A row of `RunFolder.token_kl` as HTML that needs nothing else. Pointing at a token shows its figures.

    Args:
        row: a response. Its text is a model's and is escaped.
        framed: index of a token to be framed, such as the first wrong one.
        full_color: token KL reward, in nats, from which a colour gets no stronger.
    """
    spans = []
    for i, token in enumerate(row["tokens"]):
        color, alpha = _color(row["token_kl_reward"][i], full_color)
        frame = ";outline:1px solid" if i == framed else ""
        text = re.sub("\n+", lambda breaks: "⏎" * len(breaks[0]) + "\n", html.escape(token))
        style = f"background:{color}{round(255 * alpha):02x}{frame}"
        spans.append(f'<span style="{style}" title="{html.escape(_about(row, i))}">{text}</span>')
    return (
        f'<div style="margin:0.5em 0"><div style="opacity:0.7">{html.escape(_head(row))}</div>'
        f'<div style="font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere">{"".join(spans)}</div></div>'
    )


def _head(row: Row) -> str:
    """The question, its answer and what became of it."""
    return f"{row['text']} → {row['answer']} · r={row['reward']} ({row['reason']}) · step {row['step']}"


def _color(reward: float, full_color: float) -> tuple[str, float]:
    """Colour and opacity of a token KL reward; a zero is not coloured."""
    strength = min(1.0, abs(reward) / full_color) if math.isfinite(reward) else 1.0
    return TAKEN_BACK if reward > 0 else ADDED_TO, STRONGEST * strength


def _about(row: Row, i: int) -> str:
    """What a token's tooltip says."""
    lines = [f"KL {row['kl'][i]:.3f}, token KL reward {row['token_kl_reward'][i]:+.3f} nats"]
    for who, name in (("student", "student"), ("teacher", "reviser")):
        likeliest = zip(row[f"{who}_top"][i], row[f"{who}_top_prob"][i], strict=True)
        lines.append(f"{name}: " + ", ".join(f"{token!r} {probability:.2f}" for token, probability in likeliest))
    return "\n".join(lines)


def token_figure(rows: Sequence[Row], framed: Sequence[int | None], full_color: float = FULL_COLOR) -> Figure:
    """The same as a figure, for pages that show no coloured HTML.

    Args:
        rows: responses.
        framed: for each response the index of a token to be framed, such as its first wrong one, or None.
        full_color: as in `token_html`.
    """
    if not rows:
        figure, (axes,) = new_figure(height=0.6)
        say_empty(axes, NOTHING)
        return figure
    places = [_layout(row["tokens"]) for row in rows]
    num_lines = sum(laid_out[-1][1] + 2.6 for laid_out in places)  # below a head, and above a gap
    figure = Figure((WIDTH * FONT_SIZE * 0.602 / 72, num_lines * FONT_SIZE * 1.7 / 72), facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.5, WIDTH), ylim=(num_lines, 0))
    axes.set_axis_off()
    top = 0.6
    for row, laid_out, frame in zip(rows, places, framed, strict=True):
        axes.text(0, top, _head(row), color=INK, fontsize=FONT_SIZE - 1, alpha=0.75, va="center", parse_math=False)
        for i, line, column, text in laid_out:
            color, alpha = _color(row["token_kl_reward"][i], full_color)
            corner = (column, top + line + 0.6)
            axes.add_patch(Rectangle(corner, len(text), 0.9, color=color, alpha=alpha, linewidth=0))
            if i == frame:
                axes.add_patch(Rectangle(corner, len(text), 0.9, fill=False, edgecolor=INK, linewidth=1.2))
            at = (column, top + line + 1.05)
            axes.text(
                *at, text, color=INK, family="monospace", fontsize=FONT_SIZE, va="center_baseline", parse_math=False
            )
        top += laid_out[-1][1] + 2.6
    return figure


def _layout(tokens: Sequence[str]) -> list[tuple[int, int, int, str]]:
    """(index of the token, line, column, text) of the pieces of a response, broken at its newlines and at `WIDTH`."""
    pieces, line, column = [], 0, 0
    for i, token in enumerate(tokens):
        shown = token.replace("\n", "⏎")
        for start in range(0, len(shown), WIDTH):
            piece = shown[start : start + WIDTH]
            if column + len(piece) > WIDTH:
                line, column = line + 1, 0
            pieces.append((i, line, column, piece))
            column += len(piece)
        if token.endswith("\n") and i + 1 < len(tokens):
            line, column = line + 1, 0
    return pieces
