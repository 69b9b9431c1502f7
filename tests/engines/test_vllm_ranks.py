from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.runs import run_script
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
    model = write_tiny_model(tmp_path / "model", num_key_value_heads=2)
    run_script("engine_ranks.py", model, tmp_path)
