"""The benchmark of rollouts runs: a vLLM of ours, one alone beside it, and every case on the smallest sizes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/rollouts.py"


def test_every_case_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--small", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    rows = {(row["case"].partition(": ")[2], row["side"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 16
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in rows.values())
    assert rows["call size", "calls of 2"]["figures"]["steps"] > rows["call size", "one call of 16"]["figures"]["steps"]
    shared = [row["figures"]["cached"] for (case, _), row in rows.items() if case == "prefix"]
    assert shared[0] > 0 and shared[2] == 0
    assert {"start", "warm_up", "first call", "second call"} == result["settings"]["seconds_once"]["tiny"].keys()


def test_without_vllm_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'vllm' else find(name, *rest)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert "needs vLLM" in done.stderr and done.stderr.count("\n") == 1
