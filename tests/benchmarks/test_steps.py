"""The benchmarks of whole optimizer steps run without the trainers they compare with."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "sides"), [("sd_step", ["sdzero", "sdzero top-64", "plain"]), ("srt_step", ["sdzero", "plain"])]
)
def test_a_step_is_measured_against_a_plain_loop_with_the_same_loss(
    name: str, sides: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--small", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    rows = {row["side"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows)[: len(sides)] == sides
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in rows.values())
    assert rows["plain"]["figures"]["first_loss"] == pytest.approx(rows["sdzero"]["figures"]["first_loss"], rel=1e-3)
