"""Damaged checkpoints: saves that are killed at a chosen call of `os`, and flipped bits."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdzero.trainer.checkpoint_manifest import manifest_path
from support.ranks.forked import forked


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def killed_saves(save: Callable[[Path, int, str], Path], good: Path, cases: Sequence[str]) -> dict[str, Path]:
    """Copy the finished checkpoint `good` of step 1 into a folder per case, where a save of step 2 is killed.

    A case is `NAME FUNCTION before|after N`: the checkpoint's name, and the N-th call of a function of `os`.
    """
    folders = {case: good.parent / case for case in cases}
    for case, folder in folders.items():
        folder.mkdir()
        if good.is_dir():
            shutil.copytree(good, folder / good.name)
        else:
            shutil.copy2(good, folder)
            shutil.copy2(manifest_path(good), folder)
        name, function, when, number = case.split(" ")

        def work(_: int) -> None:
            setattr(os, function, dying(getattr(os, function), when, int(number)))  # noqa: B023 - forked at once
            save(folder, 2, name)  # noqa: B023

        log = good.parent / "log"
        assert forked(1, log, work) == [-signal.SIGKILL], log.with_name("log0.log").read_text()
    return folders


def dying(real: Callable[..., Any], when: str, number: int) -> Callable[..., Any]:
    """Return `real`, which kills the process before or after its call of a number, counted from 1."""
    left = number

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call
