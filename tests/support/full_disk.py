"""Script that fills a disk of a few megabytes with checkpoints, journal and traces, and prints the outcome as JSON.

python full_disk.py FOLDER, the folder being a small file system of its own
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from sdzero.data.journal import CallJournal
from sdzero.data.trace_file import read_traces, write_traces
from sdzero.trainer.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from sdzero.trainer.checkpoint_manifest import CheckpointError
from sdzero.types import Question, Trace
from support.lone_strategy import Lone


def fill(write: Callable[[int], None]) -> tuple[int, str]:
    """Write until it fails; return the number of successful writes and the error message."""
    for done in count():
        try:
            write(done)
        except (CheckpointError, OSError) as error:
            return done, f"{type(error).__name__}: {error}"
    raise AssertionError


def checkpoints(folder: Path, save: Callable[[dict[str, Any], Path], None]) -> dict[str, Any]:
    folder.mkdir()

    def write(step: int) -> None:
        weights = torch.full((400_000,), float(step))
        save({"global_step": step, "state_dict": {"weights": weights}}, folder / f"step={step}.ckpt")

    num_saved, said = fill(write)
    newest = newest_checkpoint(folder)
    names = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".json"))
    shutil.rmtree(folder)
    return {"said": said, "num_saved": num_saved, "newest": newest and newest.name, "names": names}


def journal(folder: Path) -> dict[str, Any]:
    row = {"text": "x" * 300_000}
    num_calls, said = fill(lambda call: CallJournal(folder).put("g", str(call), "f", [row]))
    kept = [CallJournal(folder).get("g", str(call), "f") for call in range(num_calls + 1)]
    shutil.rmtree(folder)
    return {"said": said, "num_calls": num_calls, "kept": kept == [[row]] * num_calls + [None]}


def traces(path: Path) -> dict[str, Any]:
    trace = Trace(Question("q", "x" * 300_000, "1"), (1,), (), (), (2,), None)
    num_written, said = fill(lambda num: write_traces(path, [trace] * num))
    return {"said": said, "num_written": num_written, "kept": len(read_traces(path))}


if __name__ == "__main__":
    logging.disable()
    root = Path(sys.argv[1])
    out = {
        "one_file": checkpoints(root / "files", AtomicCheckpointIO().save_checkpoint),
        "sharded": checkpoints(root / "folders", Lone().save_checkpoint),
        "journal": journal(root / "journal"),
        "traces": traces(root / "traces.jsonl"),
    }
    print(json.dumps(out))
