from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.tiny_model import write_tiny_model


@pytest.fixture
def killed_before() -> Iterator[None]:
    """What an engine over two ranks leaves behind if it is killed, under the name that vLLM itself would take."""
    left = [Path(f"/dev/shm/-tp:1-[0-1]-cpushm_{rank}") for rank in (0, 1)]
    for file in left:
        file.touch()
    yield
    for file in left:
        file.unlink()


@pytest.mark.usefixtures("killed_before")
def test_two_ranks_sample_each_with_its_own_engine_then_with_one_over_both(tmp_path: Path) -> None:
    model_path = write_tiny_model(tmp_path / "model", num_key_value_heads=2)
    script = Path(__file__).parents[1] / "support/ranks/engine_ranks.py"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(model_path), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n\n".join(outputs)
    lines = [[line for line in output.splitlines() if "checksum" in line] for output in outputs]
    assert len(lines[0]) == 2 and lines[0] == lines[1]
