"""Tiny model shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tiny_model import write_tiny_model


@pytest.fixture(scope="package")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))
