"""`sdzero report RUN_DIR`: one HTML page about a run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from sdzero.report import plots, provenance, results
from sdzero.report.first_wrong import with_first_wrong
from sdzero.report.plot_style import INK, MODEL_COLORS, REWARD_COLORS
from sdzero.report.run_folder import RunFolder
from sdzero.report.samples import SampleView
from sdzero.report.svg import inline_svg
from sdzero.report.templates import render_template
from sdzero.report.token_viewer import TokenViewer
from sdzero.utils.files import write_text

PALETTE = {
    INK: "currentColor",
    **{color: f"var(--model-{i})" for i, color in enumerate(MODEL_COLORS)},
    **{color: f"var(--r{reward})" for reward, color in REWARD_COLORS.items()},
}
"""Colours of the plots -> variables of page.css, which differ between light and dark."""


@dataclass(frozen=True)
class Curve:
    """A plot on the page."""

    name: str
    title: str
    caption: str
    svg: Markup


def render(run: RunFolder) -> str:
    """Render the page of a run, finished or not. The same run gives the same bytes."""
    evaluated = results.evaluated_models(run)
    stage = run.token_kl_stage()
    token_kl = run.token_kl(stage)
    return render_template(
        "page.html",
        name=run.path.resolve().name,
        headline=results.headline(evaluated),
        missing=run.lineage.unfinished(),
        facts=provenance.facts(run),
        models=[model.label for model in evaluated],
        table=results.table(evaluated),
        curves=curves(run, token_kl),
        viewer=TokenViewer(with_first_wrong(token_kl)),
        viewer_stage=stage,
        samples=SampleView(run),
        collections=provenance.collections(run),
        stages=provenance.stage_records(run),
    )


def curves(run: RunFolder, token_kl: pd.DataFrame) -> list[Curve]:
    """Return the plots of the page that the run has data for, in order."""
    trained = [model for model in run.models if run.parent(model) and run.tags(model.name)]
    last = {model.name for model in plots.last_models(run)}
    candidates = [
        (
            bool(trained),
            "dynamics",
            "Length and revision phrases",
            "In the paper's figure 6, answers grow in SRT, which trains the model to revise in its answer, and shrink "
            "again in SelfDistill, which trains the first attempt on the reviser's distribution.",
            plots.dynamics,
        ),
        (
            any(model.name in last for model in trained),
            "evolution",
            "Accuracy during training",
            "Diamonds are the evaluations of the table. The line is validation during training, on fewer questions, "
            "with its standard error; the thin line is the reward of the training rollouts, on other questions "
            "(figure 5).",
            plots.evolution,
        ),
        (
            not token_kl.empty,
            "buckets",
            "Concentration of the KL on few tokens",
            "Each response's tokens sorted by KL, the largest first, in 20 buckets: mean and standard error over "
            "responses (figure 4).",
            lambda _: plots.bucket_curve(token_kl),
        ),
        (
            any(run.results(model) for model in run.models),
            "revisions",
            "First attempts and their revisions",
            "Each model answers, is prompted with the verdict, and revises once (figure 3).",
            plots.revision_bars,
        ),
        (
            bool(trained),
            "training",
            "Training",
            "The gap between the engine's and the trainer's log-probabilities must stay near zero.",
            plots.training_curves,
        ),
    ]
    return [
        Curve(name, title, caption, inline_svg(plot(run), name, title, PALETTE))
        for has_data, name, title, caption, plot in candidates
        if has_data
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="sdzero report", description="Writes one HTML page about a run.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the folder of `sdzero run`, finished or not")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/report.html)")
    options = parser.parse_args(arguments)
    page = render(RunFolder(options.run))
    out = options.out or options.run / "report.html"
    write_text(out, page)
    print(out)
