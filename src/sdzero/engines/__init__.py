"""Rollout engines, imported on first use: `import sdzero.engines` loads neither vLLM nor torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdzero.engines.remote.engine import RemoteVLLMEngine
    from sdzero.engines.scripted import ScriptedEngine
    from sdzero.engines.transformers import TransformersEngine
    from sdzero.engines.vllm import VLLMEngine

__all__ = ["RemoteVLLMEngine", "ScriptedEngine", "TransformersEngine", "VLLMEngine"]

_MODULES = {
    "RemoteVLLMEngine": "remote.engine",
    "ScriptedEngine": "scripted",
    "TransformersEngine": "transformers",
    "VLLMEngine": "vllm",
}
ENGINES = {_MODULES[name]: f"{__name__}.{name}" for name in ("VLLMEngine", "TransformersEngine")}
"""Names of `--engine` -> class paths: the engines that need no arguments."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
