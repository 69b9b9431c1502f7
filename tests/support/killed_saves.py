"""Saves of checkpoints that are killed at a chosen call of `os`: each of FOLDERS is named NAME FUNCTION before|after N.

python killed_saves.py file|folder FOLDERS
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sdzero.trainer.checkpoint_manifest import manifest_path

TESTS = Path(__file__).parents[1]


def killed_saves(kind: str, good: Path, cases: Sequence[str]) -> dict[str, Path]:
    """Copy the finished checkpoint `good` of step 1 into a folder per case, where a save of step 2 is killed."""
    folders = {case: good.parent / case for case in cases}
    for folder in folders.values():
        folder.mkdir()
        if kind == "folder":
            shutil.copytree(good, folder / good.name)
        else:
            shutil.copy2(good, folder)
            shutil.copy2(manifest_path(good), folder)
    command = [sys.executable, __file__, kind, *map(str, folders.values())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(-signal.SIGKILL)] * len(folders), run.stderr
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


if __name__ == "__main__":
    from sdzero.trainer.checkpoint_io import AtomicCheckpointIO
    from support.lone_strategy import Lone

    save = (AtomicCheckpointIO() if sys.argv[1] == "file" else Lone()).save_checkpoint
    for folder in sys.argv[2:]:
        name, function, when, number = Path(folder).name.split(" ")
        child = os.fork()
        if child == 0:
            setattr(os, function, dying(getattr(os, function), when, int(number)))
            weights = torch.full((1000,), 2.0)
            state = {"weights": weights} if sys.argv[1] == "file" else {"state_dict": {"weights": weights}}
            save({"global_step": 2, **state}, Path(folder, name))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
