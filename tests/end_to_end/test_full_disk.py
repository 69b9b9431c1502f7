"""A disk that is really full, a small one of its own: what was finished before is whole, and the error says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
NUM_BYTES = 8_000_000


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:  # another sandbox than bubblewrap may be here, which mounts no small disk
        required = "sandbox" in os.environ.get("SDZERO_TEST_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)("bubblewrap mounts the small disk")
    folder = tmp_path_factory.mktemp("disk")
    command = [bwrap, "--bind", "/", "/", "--dev", "/dev", "--size", str(NUM_BYTES), "--tmpfs", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, sys.executable, str(TESTS / "support/full_disk.py"), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.sandbox
@pytest.mark.parametrize("kind", ["one_file", "sharded"])
def test_checkpoints(filled: dict[str, Any], kind: str) -> None:
    """1.6 MB each: four go onto 8 MB, and of the fifth nothing stays."""
    came = filled[kind]
    assert came["said"].startswith("CheckpointError: could not save") and "make room on the disk" in came["said"]
    assert "No space left on device" in came["said"] or "with 0 MiB free" in came["said"]
    assert came["num_saved"] == 4 and came["newest"] == "step=3.ckpt"
    assert came["names"] == [f"step={step}.ckpt" for step in range(4)]


@pytest.mark.sandbox
def test_journal_and_traces(filled: dict[str, Any]) -> None:
    calls, traces = filled["journal"], filled["traces"]
    for came, name in ((calls, "g.jsonl"), (traces, "traces.jsonl")):
        assert came["said"].startswith("OSError: [Errno 28] No space left on device: '") and name in came["said"]
    assert calls["kept"] and calls["num_calls"] > 20
    assert traces["kept"] == traces["num_written"] - 1 > 5  # the longest that was written whole is still there
