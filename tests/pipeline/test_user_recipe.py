"""A recipe in the user's own folder with a stage and a method of the user's: every command takes it as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.runs import SMOKE, exit_code, read_json, records

RECIPE = f"""
extends: {SMOKE}
stages:
  base:
  collect:
  srt:
  self_distill:
  mine:
    label: Half and half
    starts_from: base
    takes: {{data.init_args.source.init_args.path: collect/traces.jsonl}}
    without: [task, engine, max_logprob_gap]
"""
STAGE = """
model:
  class_path: my_method.HalfAndHalf
  init_args: {revision_weight: 0.5, generation_weight: 0.5}
data:
  class_path: sdzero.data.TraceDataModule
  init_args:
    source: {class_path: sdzero.data.TraceFile}
    traces_per_step: 4
trainer:
  max_steps: 1
  callbacks: [{class_path: sdzero.callbacks.ExportModel}]
"""
METHOD = '''
from sdzero.methods import SRT


class HalfAndHalf(SRT):
    """SRT by another name."""
'''


def test_a_fourth_stage_goes_through_every_command(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages that it shares with the smoke recipe are not run again."""
    recipe, out = tmp_path / "ours", shutil.copytree(smoke_run, tmp_path / "out")
    recipe.mkdir()
    (recipe / "recipe.yaml").write_text(RECIPE)
    (recipe / "mine.yaml").write_text(STAGE)
    (tmp_path / "my_method.py").write_text(METHOD)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    assert exit_code(monkeypatch, "run", recipe, "--out", out, cwd=tmp_path) == 0
    said = capsys.readouterr().out
    assert said.count("finished before") == 7 and "[8/9] mine: fit" in said and "Half and half" in said
    row = read_json(out / "summary.json")[-1]
    base, *_ = read_json(out / "summary.json")
    assert (row["stage"], row["starts_from"]) == ("mine", "base") and row["num_generations"] == 256
    assert row["accuracy_gain"] == pytest.approx(row["accuracy"] - base["accuracy"])
    assert records(out)["mine"]["inputs"].keys() == {"model.class_path", *records(out)["srt"]["inputs"]}

    assert exit_code(monkeypatch, "report", out, cwd=tmp_path) == 0
    assert "Half and half" in (out / "report.html").read_text()
    capsys.readouterr()
    assert exit_code(monkeypatch, "compare", out, cwd=tmp_path) == 0
    assert "mine" in "".join(capsys.readouterr().out.split())
    assert exit_code(monkeypatch, "run", recipe, "--out", out, "--dry-run", cwd=tmp_path) == 0
    assert "│ mine/eval" in capsys.readouterr().out
