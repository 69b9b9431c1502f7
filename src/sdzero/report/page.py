"""Puts the page together and writes it."""

from __future__ import annotations

import argparse
import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sdzero.pipeline.summary import summarize
from sdzero.report import history, results, samples, tokens
from sdzero.report.figures import curves
from sdzero.report.run_folder import MODELS, RunFolder
from sdzero.utils.files import write_text
from sdzero.utils.lineage import read_lineage


def render(run: RunFolder) -> str:
    """The page of a run, finished or not: the same run gives the same bytes."""
    lineage = run.lineage()
    rows = summarize(run.path, read_lineage(run.path))
    num_questions, num_answers = results.evaluation_size(run, rows)
    stage, frame = next(
        ((s, f) for s in ("self_distill", "srt") if not (f := run.token_kl(s)).empty), ("self_distill", run.token_kl())
    )
    compared, num_shared = samples.comparisons(run, samples.control_phrases(lineage))
    return _template(
        name=run.path.resolve().name,
        headline=results.headline(rows, num_questions, num_answers, len(results.benchmarks(run, rows))),
        missing=history.missing(run),
        facts=history.facts(lineage),
        models=[MODELS[row["stage"]] for row in rows],
        table=results.table(run, rows, num_questions, num_answers),
        curves=curves(run, frame),
        viewer=tokens.viewer(frame),
        viewer_stage=stage,
        comparisons=compared,
        num_shared=num_shared,
        collection=history.collection(run.statistics()),
        stages=history.stages(lineage),
    )


def _template(**context: Any) -> str:
    loader = PackageLoader("sdzero.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    environment.filters["shortened"] = history.shortened
    sources = {name: loader.get_source(environment, name)[0] for name in ("page.css", "viewer.js")}
    script = sources["viewer.js"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        style=Markup(sources["page.css"]), script=Markup(script), script_digest=digest, **context
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="sdzero report", description="Writes one HTML page about a run.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the folder of `sdzero run`, finished or not")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/report.html)")
    options = parser.parse_args(arguments)
    page = render(RunFolder(options.run))
    out = options.out or options.run / "report.html"
    write_text(out, page)
    print(out)
