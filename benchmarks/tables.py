"""Fills the marked tables of docs/performance.md and docs/scaling.md from results/.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import fits
import floor

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs/performance.md", ROOT / "docs/scaling.md")
ARITHMETIC = {
    "floor": floor.table,
    "padding": floor.padding_table,
    "fits_srt": partial(fits.table, "srt"),
    "fits_self_distill": partial(fits.table, "self_distill"),
    "engines": fits.engines_table,
}
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(name: str, results: Path) -> str:
    """Render the table of one benchmark, with machine and date."""
    if name in ARITHMETIC:
        return ARITHMETIC[name]()
    if name == "memory":
        return fits.measured_table(results)
    result = json.loads((results / f"{name}.json").read_text())
    machine = result["machine"]
    packages = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    threads = f"{machine['threads']} thread of {machine['cores']} cores"
    head = f"{machine['processor']}, {threads}; {packages}; {result['date']}; "
    head += f"medians of {result['settings']['rounds']} rounds. Ratios are of wall time, to the side at 1.00."
    lines = ["| case | side | ratio | wall | CPU | memory | per second |", "|---|---|---|---|---|---|---|"]
    for case, rows in groupby(result["rows"], key=lambda row: row["case"]):
        lines += [_line(case if i == 0 else "", row) for i, row in enumerate(rows)]
    return "\n".join([head, "", *lines])


def _line(case: str, row: Mapping[str, Any]) -> str:
    rate = row["metrics"].get("per_second")
    extra = "" if rate is None else f"{rate:,.0f}"
    if "mfu" in row["metrics"]:
        extra = f"MFU {row['metrics']['mfu']:.0%}"
    cells = (case, row["side"], f"{row['ratio']:.2f}", _seconds(row["wall_seconds"]), _seconds(row["cpu_seconds"]))
    return "| " + " | ".join([*cells, f"{row['peak_bytes'] / 2**20:,.0f} MiB", extra]) + " |"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def filled(page: str, results: Path) -> str:
    """Return the page with every marked table rendered again."""
    return MARKED.sub(lambda match: f"{match[1]}{render(match[2], results)}\n{match[3]}", page)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(), ROOT / "benchmarks/results"))


if __name__ == "__main__":
    main()
