"""What the README says works: its commands (the `make` ones excepted), its Python, its paths."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from sdzero.prompts import PromptBuilder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_commands(smoke_run: Path, tmp_path: Path) -> None:
    """In an order a reader would take, in a folder where the smoke recipe has run."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(smoke_run, tmp_path / "runs/smoke")
    commands = [line.split("#")[0].split() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    ours = [command for command in commands if command[0] == "sdzero"]
    assert {command[1] for command in ours} == {"run", "collect", "fit", "test"}
    assert {command[0] for command in commands} == {"sdzero", "make"}
    for command in ours:
        python = [sys.executable, "-m", "sdzero", *command[1:]]
        done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, (command, done.stderr[-2000:])
    assert (tmp_path / "runs/more/traces.jsonl").stat().st_size


def test_own_task() -> None:
    scope: dict = {}
    exec(blocks("python")[0], scope)
    task = scope["Capitals"]()
    splits = [task.questions(split, 5) for split in ("phase1", "phase2", "eval")]
    assert all(splits) and len({q.id for questions in splits for q in questions}) == 3
    question = splits[0][0]
    assert task.verify(question, "It is Paris.").reward == 1 and task.verify(question, "Rome").reason == "wrong"
    assert PromptBuilder.from_pretrained(ROOT / "configs/model/tiny").prompt(question).token_ids


def test_paths_exist() -> None:
    named = set(re.findall(r"configs/[\w/.-]+\w", README)) | set(re.findall(r"^  (\w+\.py)  ", README, flags=re.M))
    missing = [p for p in named if not (ROOT / p).exists() and not (ROOT / "src/sdzero" / p).exists()]
    assert not missing and len(named) > 10
