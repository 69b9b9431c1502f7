"""Imports of torch and its companions in a child process, where a failure, a crash or a hang is a finding.

The child announces each check before it runs it: the last one announced is the one at which it died or hung.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

SECONDS = 120.0
"""Time limit; cold imports from a slow disk take a minute."""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies of vLLM that no engine needs; built for another torch, they break its imports."""


@dataclass(frozen=True)
class Finding:
    """Result of one check, or the `fault` that prevented it. seconds: wall time."""

    seconds: float = 0.0
    value: Any = None
    fault: str = ""


# --- in the child ---------------------------------------------------------------------------------


def _import(name: str, attribute: str = "__name__") -> Callable[[], None]:
    """Check that imports a package; `attribute` makes a lazy one load what an engine needs."""
    return lambda: getattr(importlib.import_module(name), attribute) and None


def _torch() -> dict[str, Any]:
    import torch

    return {"cuda": torch.version.cuda or torch.version.hip}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        raise OSError(" ".join((done.stdout + done.stderr).split()))
    return "; ".join(done.stdout.strip().splitlines())


def _gpus() -> list[dict[str, Any]]:
    """Return name and memory (bytes free, bytes total) of each GPU."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda:
            torch.cuda.init()  # raises the reason
        return []
    devices = range(torch.cuda.device_count())
    return [{"name": torch.cuda.get_device_name(d), "memory": torch.cuda.mem_get_info(d)} for d in devices]


def _checks() -> dict[str, Callable[[], Any]]:
    """Return the checks by name; those most likely to hang or crash come last."""
    return {
        "torch": _torch,
        "transformers": _import("transformers", "AutoModelForCausalLM"),
        "lightning": _import("lightning"),
        **({"vllm": _import("vllm", "LLM")} if find_spec("vllm") else {}),
        **{name: _import(name) for name in COMPANIONS if find_spec(name)},
        **({"driver": _driver} if shutil.which("nvidia-smi") else {}),
        "gpus": _gpus,
    }


def _describe(error: BaseException) -> str:
    """Describe the root cause on one line: transformers wraps errors of other packages' imports in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def run_checks() -> None:
    """Run all checks and write JSON lines to the original standard output; output of libraries is discarded."""
    with os.fdopen(os.dup(1), "w") as report:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for name, check in _checks().items():
            print(json.dumps({"name": name}), file=report, flush=True)
            started, finding = time.monotonic(), {}
            try:
                finding["value"] = check()
            except Exception as error:  # noqa: BLE001 - any error of an import is the finding
                finding["fault"] = _describe(error)
            finding["seconds"] = time.monotonic() - started
            print(json.dumps({"name": name, **finding}), file=report, flush=True)
    os._exit(0)  # imported libraries may hang at exit


# --- in the parent --------------------------------------------------------------------------------


class Probe:
    """The child process, started immediately; `findings` waits for it."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from sdzero.cli.doctor.probe import run_checks; run_checks()"]
        null = subprocess.DEVNULL
        self._child = subprocess.Popen(command, stdin=null, stdout=subprocess.PIPE, stderr=null)
        self._deadline = time.monotonic() + SECONDS

    def findings(self) -> dict[str, Finding]:
        """Return findings by name. The check at which the child hung or died has a fault; later ones are absent."""
        try:
            output, _ = self._child.communicate(timeout=self._deadline - time.monotonic())
            end = f"its process died ({self._child.returncode})"
        except subprocess.TimeoutExpired as timeout:
            output, end = timeout.output or b"", f"no end after {SECONDS:.0f} s"
            self._child.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that waits for a driver cannot be killed
                self._child.wait(1)
        found: dict[str, Finding] = {}
        for line in map(json.loads, output.splitlines()):
            name = line.pop("name")
            found[name] = Finding(**line) if line else Finding(fault=end)
        return found
