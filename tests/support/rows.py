"""Helpers for tasks whose questions are rows: a JSONL file, and a task from a config."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from sdzero.tasks import Task


def jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write a JSONL file; return its path for a config."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def from_config(class_path: str, base: type = Task, **init_args: Any) -> Any:
    """Instantiate a class as the commands do."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "it")
    return parser.instantiate(parser.parse_object({"it": {"class_path": class_path, "init_args": init_args}})).it


def collect_config(folder: Path, class_path: str, **init_args: Any) -> Path:
    """Write the config of a collection with a task and the tiny model."""
    keys = {
        "student": {"path": "configs/tiny_model", "weights": "random"},
        "task": {"class_path": class_path, "init_args": init_args},
        "engine": {"class_path": "sdzero.engines.TransformersEngine"},
        "out": str(folder / "out"),
    }
    (folder / "collect.yaml").write_text(json.dumps(keys))
    return folder / "collect.yaml"
