"""Tests marked `gpu` are deselected on a machine without a CUDA device; the smoke recipe runs once for all tests."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from runs import SMOKE, sdzero


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # slow, so only where a test asks for it

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one uninterrupted `sdzero run configs/recipes/smoke`. Read it, or copy it; never write there."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the folder that all workers share
    out = folder / "smoke"
    with (folder / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "summary.json").exists():
            done = sdzero("run", SMOKE, "--out", out)
            (folder / "smoke.log").write_text(done.stdout + done.stderr)
            assert done.returncode == 0, done.stdout + done.stderr
    return out
