"""The benchmarks run, at sizes that say nothing about speed; the page of figures shows what the results hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALL = """
import runpy, sys
sys.path.insert(0, "benchmarks")
out, *names = sys.argv[1:]
for name in names:
    sys.argv = [name, "--small", "--rounds", "1", "--out", out]
    runpy.run_path(f"benchmarks/{name}.py", run_name="__main__")
"""
SIDES = {
    "heads": {"floor", "ours", "ours, top-64 renormalised", "ours, JSD", "naive"},
    "scaling": {"floor", "ours", "naive", "interleaved", "first"},
    "passes": {"teacher", "student"},
}


def python(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_heads_passes_and_scaling_run(tmp_path: Path) -> None:
    python("-c", ALL, tmp_path, *SIDES)
    for name, sides in SIDES.items():
        result = json.loads((tmp_path / f"{name}-small.json").read_text())
        assert {row["side"] for row in result["rows"]} == sides
        assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in result["rows"])
        assert result["machine"]["packages"]["torch"] and result["date"] and result["settings"]["rounds"] == 1


def test_the_pages_show_the_results() -> None:
    """And docs/scaling.md what the plan's arithmetic says today."""
    told = python(
        "-c",
        "import sys; sys.path.insert(0, 'benchmarks'); import tables as t; r = t.ROOT / 'benchmarks/results'; "
        "print([page.name for page in t.PAGES if t.filled(page.read_text(), r) != page.read_text()])",
    )
    assert told.strip() == "[]", "run `python benchmarks/tables.py`"


def test_the_arithmetic_of_memory_is_that_of_a_real_step(tmp_path: Path) -> None:
    """Self-distillation with checkpointing by two processes under FullShard, every allocation counted."""
    python("benchmarks/memory.py", "--small", "--out", tmp_path)
    rows = json.loads((tmp_path / "memory-small.json").read_text())["rows"]
    assert [row["moment"] for row in rows] == ["backward", "update"]
    for row in rows:
        assert abs(row["ratio"] - 1) < (0.1 if row["moment"] == "backward" else 0.01), row
