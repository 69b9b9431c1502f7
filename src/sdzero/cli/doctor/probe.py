"""What needs torch, asked in a child process: an import that fails, crashes or hangs is a finding.

The child imports one thing after the other and writes a line when it begins and when it has ended each, so that the
one at which it died or stood still is known.
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
from threading import Thread
from typing import Any

SECONDS = 120.0
"""Cold imports from a slow disk take a minute."""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM brings along: needed by neither engine, and of another build than torch they break its imports."""


@dataclass(frozen=True)
class Finding:
    """What one question gave, or the `fault` that kept it from an answer. seconds: wall clock."""

    seconds: float = 0.0
    value: Any = None
    fault: str = ""


# --- in the child ---------------------------------------------------------------------------------


def _torch() -> dict[str, Any]:
    import torch

    return {"cuda": torch.version.cuda or torch.version.hip}


def _transformers() -> None:
    from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401 - lazy until a name is asked for


def _vllm() -> None:
    from vllm import LLM  # noqa: F401 - lazy until a name is asked for


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        raise OSError(" ".join((done.stdout + done.stderr).split()))
    return "; ".join(done.stdout.strip().splitlines())


def _gpus() -> list[dict[str, Any]]:
    """Name and memory (bytes free, bytes in all) of each."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda:
            torch.cuda.init()  # says why
        return []
    devices = range(torch.cuda.device_count())
    return [{"name": torch.cuda.get_device_name(d), "memory": torch.cuda.mem_get_info(d)} for d in devices]


def _questions(is_installed: Callable[[str], bool]) -> dict[str, Callable[[], Any]]:
    """The likeliest to hang or to crash come last."""
    questions: dict[str, Callable[[], Any]] = {
        "torch": _torch,
        "transformers": _transformers,
        "lightning": lambda: importlib.import_module("lightning") and None,
    }
    if is_installed("vllm"):
        questions["vllm"] = _vllm
    for name in filter(is_installed, COMPANIONS):
        questions[name] = lambda name=name: importlib.import_module(name) and None
    if shutil.which("nvidia-smi"):
        questions["driver"] = _driver
    return {**questions, "gpus": _gpus}


def _why(error: BaseException) -> str:
    """In one line. transformers hides the error of another package's import behind one of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def answer() -> None:
    """The child's work: lines of JSON on what was its standard output; what libraries print goes nowhere."""
    with os.fdopen(os.dup(1), "w") as report:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for name, question in _questions(lambda module: find_spec(module) is not None).items():
            print(json.dumps({"name": name}), file=report, flush=True)
            started, finding = time.monotonic(), {}
            try:
                finding["value"] = question()
            except Exception as error:  # noqa: BLE001 - whatever an import raises is the finding
                finding["fault"] = _why(error)
            finding["seconds"] = time.monotonic() - started
            print(json.dumps({"name": name, **finding}), file=report, flush=True)
    os._exit(0)  # what was imported may hang on its way out


# --- in the parent --------------------------------------------------------------------------------


class Probe:
    """The child, started at once; `findings` waits for it."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from sdzero.cli.doctor.probe import answer; answer()"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._lines: list[dict[str, Any]] = []
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()
        self._deadline = time.monotonic() + SECONDS

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.append(json.loads(line))

    def findings(self) -> dict[str, Finding]:
        """By name. One at which the child hung or died has a fault, and those after it are not there."""
        self._reader.join(self._deadline - time.monotonic())
        hangs = self._reader.is_alive()
        if hangs:
            self._child.kill()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a driver does not even die
            self._child.wait(1)
        found: dict[str, Finding] = {}
        for line in list(self._lines):
            name = line.pop("name")
            end = f"no end after {SECONDS:.0f} s" if hangs else f"its process died ({self._child.returncode})"
            found[name] = Finding(**line) if line else Finding(fault=end)
        return found
