"""Curves over the trainings of a made-up run."""

from __future__ import annotations

import math

import pytest

from sdzero.report import RunFolder, phases
from support.made_up_run import MODELS, write_curves, write_lineage


@pytest.fixture
def run(tmp_path):
    """3 steps of SRT and 4 of SelfDistill, validated after every second one, with a new teacher after the third."""
    write_lineage(tmp_path)
    for model, length in zip(MODELS, (10.0, 30.0, 15.0), strict=True):
        write_curves(tmp_path / model / "eval", {"eval/response_tokens": [length], "eval/response_tokens_se": [1.0]})
    write_curves(tmp_path / "srt", {"train/loss": [3.0, 2.0, 1.0], "eval/response_tokens": {1: 20.0}})
    distilled = {
        "train/loss": [0.4, 0.3, 0.2, 0.1],
        "teacher/generation": [0.0, 0.0, 1.0, 1.0],
        "rollout/length": [30.0, 25.0, 20.0, 16.0],
        "eval/response_tokens": {1: 24.0, 3: 15.5},
    }
    write_curves(tmp_path / "self_distill", distilled)
    return RunFolder(tmp_path)


def test_a_curve_counts_the_updates_behind_each_evaluated_model(run):
    curve = phases.over_phases(run, "response_tokens", "length")
    of_kind = {kind: [*zip(g["model"], g["step"], g["value"], strict=True)] for kind, g in curve.groupby("kind")}
    assert of_kind["evaluation"] == [("base", 0, 10.0), ("srt", 3, 30.0), ("self_distill", 4, 15.0)]
    assert of_kind["validation"] == [("srt", 2, 20.0), ("self_distill", 2, 24.0), ("self_distill", 4, 15.5)]
    assert of_kind["rollout"] == [("self_distill", step, value) for step, value in enumerate([30.0, 25.0, 20.0, 16.0])]
    assert curve.query("kind == 'evaluation'")["se"].tolist() == [1.0] * 3
    assert all(map(math.isnan, curve.query("kind != 'evaluation'")["se"]))


def test_a_new_teacher_counts_from_the_update_that_it_followed(run):
    assert phases.teacher_syncs(run, "self_distill") == [3]


def test_a_partial_run_has_partial_curves(tmp_path):
    write_lineage(tmp_path)
    write_curves(tmp_path / "srt", {"train/loss": [1.0, 0.5]})
    run = RunFolder(tmp_path)
    assert phases.num_steps(run, "srt") == 2 and phases.num_steps(run, "self_distill") == 0
    assert len(phases.over_phases(run, "response_tokens", "length")) == 0
    assert phases.teacher_syncs(run, "self_distill") == []
