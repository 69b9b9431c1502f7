"""Errors of the grading machinery and of missing packages."""

from __future__ import annotations

from importlib.util import find_spec


class GraderError(RuntimeError):
    """The grading machinery failed. Never turned into a reward."""


class NoSandboxError(GraderError):
    """No sandbox is safe on this machine. The message gives the reason for each kind, with the remedy."""


def require_package(user: str, module: str, extra: str) -> None:
    """Raise ModuleNotFoundError, naming the extra, unless a package is installed."""
    if find_spec(module) is None:
        package = module.replace("_", "-")
        raise ModuleNotFoundError(f'{user} needs the package {package}: pip install "sdzero[{extra}]"', name=module)
