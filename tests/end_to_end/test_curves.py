"""The curves of a run, read back from its event files: their names are those of docs/curves.md, their points those of
the run's other files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from sdzero.cli.lightning import LAYOUT
from sdzero.evaluation.keywords import count_keywords
from sdzero.report import RunFolder
from support.runs import ROOT, read_json, responses, scalars

PAGE = (ROOT / "docs/curves.md").read_text()
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
DOCUMENTED = {name: what for cell, what, _ in ROWS for name in re.findall(r"`([\w/]+)`", cell)}
TRAINED = ("base", "srt", "self_distill")
LIGHTNINGS = {"epoch"}


def tags(run: Path) -> set[str]:
    found = {tag for stage in (*TRAINED, *(f"{s}/eval" for s in TRAINED)) for tag in RunFolder(run).tags(stage)}
    return {re.sub(r"pass_at_\d+", "pass_at_8", tag.removesuffix("_se")) for tag in found - LIGHTNINGS}


def test_every_curve_is_documented_and_every_documented_curve_is_there(smoke_run: Path) -> None:
    found = tags(smoke_run)
    assert found - DOCUMENTED.keys() == set()
    missing = {name for name in DOCUMENTED.keys() - found if "²" not in DOCUMENTED[name]}
    assert missing == set() and len(found) > 70


def test_every_step_and_every_evaluation_has_its_points(smoke_run: Path) -> None:
    run = RunFolder(smoke_run)
    for tag in (
        "train/loss",
        "rollout/reward",
        "rollout/keywords_per_response",
        "rollout/logprob_gap",
        "budget/generations",
    ):
        assert [step for step, _ in run.scalars("self_distill", tag)] == [0, 1, 2, 3, 4], tag
    assert [step for step, _ in run.scalars("self_distill", "teacher/kl_top10_share_r0")] == [0, 2, 4]
    for tag in ("eval/avg_at_k", "eval/response_tokens", "eval/keywords_per_response", "eval/phrase_leak"):
        assert [step for step, _ in run.scalars("srt", tag)] == [2, 5], tag


def test_points_are_those_of_the_journal(smoke_run: Path) -> None:
    run, journal, num_checked = RunFolder(smoke_run), smoke_run / "self_distill/journal/rank0", 0
    for step, value in run.scalars("self_distill", "rollout/keywords_per_response"):
        texts = [r["text"] for r in responses(journal, f"train-{step:06d}")]
        if texts:  # older steps' calls are forgotten
            num_checked += 1
            assert value == pytest.approx(sum(map(count_keywords, texts)) / len(texts))
    assert num_checked
    lengths = [len(r["token_ids"]) for r in responses(smoke_run / "srt/eval/journal/rank0", "eval")]
    results = read_json(smoke_run / "srt/eval/results.json")
    assert results["eval/length_max"] == max(lengths)
    assert results["eval/length_p50"] == sorted(lengths)[(len(lengths) + 1) // 2 - 1]
    for name, value in results.items():
        point = scalars(smoke_run / "srt/eval", name)[-1]
        assert (value is None) or point[0][1] == pytest.approx(value, rel=1e-5), name


def test_the_layout_is_in_the_events_and_its_curves_exist(smoke_run: Path) -> None:
    (file,) = (smoke_run / "self_distill").glob("events*")
    (event,) = EventAccumulator(str(file)).Reload().Tensors("custom_scalars__config__")
    layout = getattr(layout_pb2, "Layout").FromString(event.tensor_proto.string_val[0])  # noqa: B009 - made at run time
    assert [category.title for category in layout.category] == list(LAYOUT)
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert len(patterns) > 10
    found = tags(smoke_run)
    assert [pattern for pattern in patterns if not any(re.search(pattern, tag) for tag in found)] == []


def test_the_pages_python_runs(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/smoke").symlink_to(smoke_run)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0], scope)
    assert len(scope["length"]) == 2 and len(scope["table"]) > 10
