"""`sdzero report RUN_DIR`: one HTML page about a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from sdzero.pipeline.summary import read_json
from sdzero.report import plots, results
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

FACTS = {
    "task": "task.class_path",
    "model": "student.path",
    "engine": "engine.class_path",
    "seed": "seed_everything",
    "accelerator": "trainer.accelerator",
}
"""Facts at the top of the page -> suffix of their config key."""

ATTEMPTS = {
    "initial": "first attempts",
    "revision_r0": "revisions of wrong attempts",
    "revision_r1": "revisions of right attempts",
}
"""Kind of attempt in a collection's statistics -> heading."""


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
        facts=facts(run),
        models=[model.label for model in evaluated],
        table=results.table(evaluated),
        curves=curves(run, token_kl),
        viewer=TokenViewer(with_first_wrong(token_kl)),
        viewer_stage=stage,
        samples=SampleView(run),
        collections=collections(run),
        stages=run.lineage.stages,
    )


def facts(run: RunFolder) -> dict[str, str]:
    """Return the run's facts from the first stage whose config has them."""
    found: dict[str, str] = {}
    for name, suffix in FACTS.items():
        values = [str(v) for c in run.configs() for k, v in c.items() if k == suffix or k.endswith(f".{suffix}")]
        if values:
            found[name] = values[0].rpartition(".")[2] if "class_path" in suffix else values[0]
    versions = [record.get("versions", {}).items() for record in run.lineage.stages.values()]
    texts = {", ".join(f"{package} {version}" for package, version in each) for each in versions if each}
    return {**found, "versions": " / ".join(sorted(texts))}


def collections(run: RunFolder) -> list[dict[str, Any]]:
    """Return stage, statistics, reasons of the verdicts and statistics by attempt of each finished collection."""
    found = []
    for stage in run.lineage.collections:
        if statistics := read_json(run.path / stage.name / "statistics.json"):
            attempts = {label: statistics[kind] for kind, label in ATTEMPTS.items() if kind in statistics}
            rates = {key for attempt in attempts.values() for key in attempt if key.startswith("rate_")}
            reasons = sorted((key.removeprefix("rate_") for key in rates), key=lambda r: (r != "correct", r))
            found.append({"stage": stage.name, "statistics": statistics, "reasons": reasons, "attempts": attempts})
    return found


def curves(run: RunFolder, token_kl: pd.DataFrame) -> list[dict[str, Any]]:
    """Return name, title and SVG of the plots that the run has data for, in order."""
    trained = [model for model in run.models if run.parent(model) and run.tags(model.name)]
    last = {model.name for model in plots.last_models(run)} & {model.name for model in trained}
    has_results = any(map(run.results, run.models))
    figures = {
        ("dynamics", "Length and revision phrases"): plots.dynamics(run) if trained else None,
        ("evolution", "Accuracy during training"): plots.evolution(run) if last else None,
        ("buckets", "Concentration of the KL on few tokens"): None if token_kl.empty else plots.bucket_curve(token_kl),
        ("revisions", "First attempts and their revisions"): plots.revision_bars(run) if has_results else None,
        ("training", "Training"): plots.training_curves(run) if trained else None,
    }
    return [
        {"name": name, "title": title, "svg": inline_svg(figure, name, title, PALETTE)}
        for (name, title), figure in figures.items()
        if figure is not None
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
