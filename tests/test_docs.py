"""What the README and docs/ say works: their commands are run, in a folder where the smoke recipe has run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from configs.recipes.own_data.opsd import SeesSolution
from helpers import make_scored
from runs import ROOT, read_json
from sdzero.prompts import PromptBuilder
from sdzero.types import Question

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "make ": "sets up a venv of its own; `make test` is what runs these tests",
    "pip ": "changes the installation",
    "tensorboard ": "serves until it is stopped; tests/test_curves.py reads its files",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    """Each once, in a reader's order."""
    lines = [
        line.split(" #")[0].strip() for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()
    ]
    ours = [line for line in lines if line and not line.startswith((*NOT_RUN, "#"))]
    # tests/test_smollm2.py runs that recipe, cut short
    return [command for command in dict.fromkeys(ours) if "smollm2" not in command]


@pytest.fixture(scope="module")
def folder(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them have run."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(smoke_run, folder / "runs/smoke")
    for command in commands():
        program, *arguments = shlex.split(command)
        assert program == "sdzero", f"a document runs {command!r}: neither tested here nor in NOT_RUN"
        done = subprocess.run(
            [sys.executable, "-m", "sdzero", *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-2000:])
    return folder


def test_the_commands_run_and_leave_what_they_promise(folder: Path) -> None:
    assert {command.split()[1] for command in commands()} >= {
        "run",
        "collect",
        "fit",
        "test",
        "report",
        "doctor",
        "init",
    }
    assert (folder / "runs/more/traces.jsonl").stat().st_size
    assert [row["stage"] for row in read_json(folder / "runs/own_data/summary.json")] == ["base", "srt", "self_distill"]
    for run in ("smoke", "own_data"):
        assert "</html>" in (folder / f"runs/{run}/report.html").read_text()


def test_opsd_moved_the_weights_towards_a_teacher_that_saw_the_solution(folder: Path) -> None:
    before, after = (
        load_file(folder / path / "model/model.safetensors") for path in ("runs/smoke/base", "runs/own_data/opsd")
    )
    assert all(not after[name].equal(tensor) for name, tensor in before.items())
    builder = PromptBuilder.from_pretrained(folder / "runs/smoke/base/model")
    question = Question("q", "3-7*1=", "6", {"solution": "3-7=6*1=6A6"})
    scored = make_scored(builder, question, "3-7=5A5", 0)
    read = SeesSolution("{question}\n\n{solution}")(builder, scored, []).token_ids
    assert read == builder.chat("3-7*1=\n\n3-7=6*1=6A6") != scored.rollout.prompt.token_ids
    with pytest.raises(ValueError, match="question 'q' has no solution in column 'proof'"):
        SeesSolution(column="proof")(builder, scored, [])


def test_the_pages_show_the_files_that_they_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page, recipe = ROOT / "docs/own_data.md", ROOT / "configs/recipes/own_data"
    (config,) = blocks(page, "yaml")
    shown = [line.split(" #")[0] for line in config.splitlines()]
    there = [line.split(" #")[0] for line in (recipe / "task.yaml").read_text().splitlines() if line[0] != "#"]
    assert shown == there
    (row,) = blocks(page, "json")
    assert row in (recipe / "questions.jsonl").read_text()
    verifier, trial = blocks(page, "python")
    assert verifier.partition("class ")[2] == (recipe / "verifier.py").read_text().partition("class ")[2]
    exec(verifier + trial, {})


def test_the_readmes_task(tmp_path: Path) -> None:
    scope: dict = {}
    (source,) = blocks(ROOT / "README.md", "python")
    exec(source, scope)
    rows = {"phase1": ("France", "Paris"), "phase2": ("Italy", "Rome"), "eval": ("Spain", "Madrid")}
    for split, (country, capital) in rows.items():
        row = {"q": f"What is the capital of {country}?", "a": capital}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    paths = {split: str(tmp_path / f"{split}.jsonl") for split in rows}
    task = scope["Capitals"](paths, question_column="q", answer_column="a")
    (question,) = task.questions("phase2", 1)
    assert task.verify(question, "It is Rome.").reward == 1 and task.verify(question, "Paris").reason == "wrong"


def test_paths_exist() -> None:
    readme = PAGES[0].read_text()
    named = set(re.findall(r"configs/[\w/.-]+\w", readme)) | set(re.findall(r"^  (\w+\.py)  ", readme, flags=re.M))
    missing = [p for p in named if not (ROOT / p).exists() and not (ROOT / "src/sdzero" / p).exists()]
    assert not missing and len(named) > 10
