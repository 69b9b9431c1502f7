"""Data modules, in which one batch is one optimizer step.

The classes are imported on first use: `import sdzero.data` brings neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdzero.data.base import EvaluationDataModule
    from sdzero.data.eval_stream import Evaluation
    from sdzero.data.rollouts import RolloutDataModule
    from sdzero.data.traces import TraceDataModule, TraceFile

__all__ = ["Evaluation", "EvaluationDataModule", "RolloutDataModule", "TraceDataModule", "TraceFile"]

_MODULES = {
    "Evaluation": "eval_stream",
    "EvaluationDataModule": "base",
    "RolloutDataModule": "rollouts",
    "TraceDataModule": "traces",
    "TraceFile": "traces",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
