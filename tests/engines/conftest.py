"""Servers without a model for tests of RemoteVLLMEngine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdzero.engines import RemoteVLLMEngine
from sdzero.engines.base import EngineSpec
from sdzero.prompts import PromptBuilder
from support.fake_vllm_server import FakeServer, Start


@pytest.fixture
def servers() -> Iterator[Callable[[], FakeServer]]:
    running: list[FakeServer] = []

    def start() -> FakeServer:
        running.append(FakeServer())
        threading.Thread(target=running[-1].serve_forever, args=(0.01,), daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(servers: Callable[[], FakeServer]) -> FakeServer:
    return servers()


@pytest.fixture
def start(server: FakeServer, path: Path, builder: PromptBuilder, tmp_path: Path) -> Iterator[Start]:
    """Starts an engine of one server with options; all are closed in the end, also those that never started."""
    engines: list[RemoteVLLMEngine] = []

    def start(url: str = f"{server.url}/", load_weights: bool = False, **options: Any) -> RemoteVLLMEngine:
        options = {"folder": tmp_path / "weights", "deadline_seconds": 5, "start_seconds": 0.3, **options}
        engines.append(RemoteVLLMEngine([url], **options))
        engines[-1].start(EngineSpec(str(path), 64, load_weights=load_weights), builder)
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
