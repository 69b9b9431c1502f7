"""The commands and code of README.md and docs/ work, in a folder where the smoke recipe has run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sdzero.methods import self_distill
from sdzero.methods.batching import collate
from sdzero.prompts import PromptBuilder
from support.runs import ROOT, exit_code, read_json, rows
from support.sandboxes import lacks_sandbox

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "make ": "sets up a venv; `make test` runs these tests",
    "pip ": "changes the installation",
    "tensorboard ": "does not end; tests/end_to_end/test_curves.py reads its files",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    """Commands of all pages, each once, in reading order."""
    lines = [
        line.split(" #")[0].strip() for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()
    ]
    ours = [line for line in lines if line and not line.startswith((*NOT_RUN, "#"))]
    # tests/end_to_end/test_smollm2.py runs that recipe, cut short
    ours = [line for line in dict.fromkeys(ours) if "smollm2" not in line]
    return [line for line in ours if not (line.startswith("sdzero judge") and lacks_sandbox())]


@pytest.mark.timeout(1800)  # all of them, on a loaded machine
def test_the_commands_run_and_write_their_results(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported torch; the stages of `sdzero run` are child processes."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(smoke_run, tmp_path / "runs/smoke")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for line in commands():
        program, *arguments = shlex.split(line)
        assert program == "sdzero", f"a document runs {line!r}: neither tested here nor in NOT_RUN"
        assert exit_code(monkeypatch, *arguments, cwd=tmp_path) in (0, None), line
    run = {line.split()[1] for line in commands()}
    assert run >= {"run", "collect", "fit", "test", "report", "doctor", "init"}
    assert (tmp_path / "runs/more/traces.jsonl").stat().st_size
    stages = [row["stage"] for row in read_json(tmp_path / "runs/own_data/summary.json")]
    assert stages == ["base", "srt", "self_distill"]
    for run in ("smoke", "own_data"):
        assert "</html>" in (tmp_path / f"runs/{run}/report.html").read_text()
    assert (tmp_path / "runs/own_data/opsd/model/model.safetensors").is_file()


def test_opsd_trains_with_a_teacher_that_reads_the_solution(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the page's command on folders of the smoke run, and record every sequence of both models."""
    sequences: list[Any] = []

    def seen(contexts: Any, targets: Any, *rest: Any) -> Any:
        sequences.append((contexts, targets))
        return collate(contexts, targets, *rest)

    monkeypatch.setattr(self_distill, "collate", seen)
    recipe, base = ROOT / "configs/recipes/own_data", smoke_run / "base/model"
    configs = ("--config", recipe / "self_distill.yaml", "--config", recipe / "opsd.yaml")
    ours = (f"--model.student.path={base}", f"--data.disjoint_from={smoke_run}/collect/questions.json")
    assert exit_code(monkeypatch, "fit", *configs, *ours, f"--trainer.default_root_dir={tmp_path}") == 0

    rows_by_prompt = {}
    builder = PromptBuilder.from_pretrained(base)
    for row in rows(recipe / "questions.jsonl"):
        rows_by_prompt[builder.chat(row["problem"])] = builder.chat(f"{row['problem']}\n\n{row['solution']}")
    for (contexts, same_answers), (prompts, answers) in zip(sequences[::2], sequences[1::2], strict=True):
        assert answers == same_answers and contexts == [rows_by_prompt[prompt] for prompt in prompts]
    assert sum(len(answers) for _, answers in sequences[::2]) == 3 * 16
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "model"))
    assert all(not after[name].equal(tensor) for name, tensor in before.items())


def test_the_pages_show_the_files_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
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
    cities = {"phase1": ("France", "Paris"), "phase2": ("Italy", "Rome"), "eval": ("Spain", "Madrid")}
    for split, (country, capital) in cities.items():
        row = {"q": f"What is the capital of {country}?", "a": capital}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    paths = {split: str(tmp_path / f"{split}.jsonl") for split in cities}
    task = scope["Capitals"](paths, question_column="q", answer_column="a")
    (question,) = task.questions("phase2", 1)
    assert task.verify(question, "It is Rome.").reward == 1 and task.verify(question, "Paris").reason == "wrong"


def test_paths_exist() -> None:
    readme = PAGES[0].read_text()
    named = set(re.findall(r"configs/[\w/.-]+\w", readme)) | set(re.findall(r"^  (\w+\.py)  ", readme, flags=re.M))
    missing = [p for p in named if not (ROOT / p).exists() and not (ROOT / "src/sdzero" / p).exists()]
    assert not missing and len(named) > 10
