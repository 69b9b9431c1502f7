"""The curves: matplotlib's figures of a run, those that it has left anything for."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from sdzero.report import plots
from sdzero.report.run_folder import MODELS, RunFolder
from sdzero.report.svg import inline_svg

PALETTE = {plots.INK: "currentColor", **{color: f"var(--{name})" for name, color in plots.COLORS.items()}}
"""A figure's colours -> the variables of page.css, which differ between light and dark."""


@dataclass(frozen=True)
class Curve:
    """A figure on the page."""

    name: str
    title: str
    caption: str
    svg: Markup


def curves(run: RunFolder, token_kl: pd.DataFrame) -> list[Curve]:
    """The figures in the page's order.

    Args:
        run: the run's folder.
        token_kl: what TokenKLRecorder left in the stage that the page shows.
    """
    trained = any(run.tags(stage) for stage in ("srt", "self_distill"))
    wanted = [
        (
            trained,
            "dynamics",
            "Length and revision phrases",
            "In the paper's figure 6 answers grow in SRT, which has the model revise aloud, and shrink again in "
            "SelfDistill, which moves what the reviser knows into the first attempt.",
            plots.dynamics,
        ),
        (
            bool(run.tags("self_distill")),
            "evolution",
            "Accuracy during SelfDistill",
            "Diamonds are the evaluations of the table. The line is validation on the way, on fewer questions, with "
            "its standard error; the thin one the rollouts it learns from, of other questions (figure 5).",
            plots.evolution,
        ),
        (
            not token_kl.empty,
            "buckets",
            "How few tokens carry the signal",
            "Each response's tokens sorted by KL, the largest first, in 20 buckets: mean and standard error over "
            "responses (figure 4).",
            lambda _: plots.bucket_curve(token_kl),
        ),
        (
            any(run.results(model) for model in MODELS),
            "revisions",
            "First attempts and their revisions",
            "Each model answers, is told whether it is right, and revises once (figure 3).",
            plots.revision_bars,
        ),
        (
            trained,
            "training",
            "Training",
            "The gap between the engine's and the trainer's log-probabilities must stay near zero.",
            plots.training_curves,
        ),
    ]
    return [
        Curve(name, title, caption, inline_svg(draw(run), name, title, PALETTE))
        for there, name, title, caption, draw in wanted
        if there
    ]
