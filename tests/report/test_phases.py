"""Curves over both phases, and the tables of evaluations, read from the files of a made-up run."""

from __future__ import annotations

import math

import pytest

from sdzero.report import RunFolder, phases, revision
from sdzero.report import text_samples as samples
from support.made_up_curves import write_curves
from support.made_up_run import MODELS, sample_row, write_evaluation, write_samples


@pytest.fixture
def run(tmp_path):
    """3 steps of SRT and 4 of SelfDistill, validated after every second one, with a new teacher after the third."""
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


def test_a_curve_counts_the_updates_behind_the_model_that_was_asked(run):
    curve = phases.over_phases(run, "response_tokens", "length")
    of_kind = {
        kind: list(zip(*(g[c] for c in ("phase", "step", "value")), strict=True)) for kind, g in curve.groupby("kind")
    }
    assert of_kind["evaluation"] == [("base", 0, 10.0), ("srt", 3, 30.0), ("self_distill", 4, 15.0)]
    assert of_kind["validation"] == [("srt", 2, 20.0), ("self_distill", 2, 24.0), ("self_distill", 4, 15.5)]
    assert of_kind["rollout"] == [("self_distill", step, value) for step, value in enumerate([30.0, 25.0, 20.0, 16.0])]
    assert curve.query("kind == 'evaluation'")["se"].tolist() == [1.0] * 3
    assert all(map(math.isnan, curve.query("kind != 'evaluation'")["se"]))


def test_a_new_teacher_counts_from_the_update_after_which_it_was_taken(run):
    assert phases.teacher_syncs(run) == [3]


def test_a_partial_run_has_partial_curves(tmp_path):
    write_curves(tmp_path / "srt", {"train/loss": [1.0, 0.5]})
    run = RunFolder(tmp_path)
    assert phases.num_steps(run, "srt") == 2 and phases.num_steps(run, "self_distill") == 0
    assert len(phases.over_phases(run, "response_tokens", "length")) == len(phases.evaluations(run, ["avg_at_k"])) == 0
    assert phases.teacher_syncs(run) == [] and len(revision.table_9(run)) == 0
    assert samples.same_question(run) == samples.revisions(run, 2) == ""


def test_table_9_reads_in_percent_and_says_what_is_missing(tmp_path):
    figures = {"eval/revise_acc1": 0.5, "eval/revise_acc1_se": 0.0213, "eval/revise_correction_rate": -0.1}
    write_evaluation(tmp_path, "base", {"q": [0, 1]}, **figures)
    write_evaluation(tmp_path, "srt", {"q": [0, 1]}, **{"eval/revise_tokens2": 32.16, "eval/revise_acc1_se": None})
    table = revision.table_9(RunFolder(tmp_path))
    assert table.index.tolist() == ["base", "SRT"]
    assert table.loc["base"].tolist() == ["-", "-", "50.0 ± 2.1", "-", "-10.0"]
    assert table.loc["SRT"].tolist() == ["-", "32.2", "-", "-", "-"]


def test_revising_stands_beside_resampling(tmp_path):
    names = [f"{kind}_{flip}_rate" for kind in ("revise", "resample") for flip in ("wrong_to_right", "right_to_wrong")]
    values = {f"eval/{name}": value for name, value in zip(names, (0.1, 0.2, 0.3, 0.4), strict=True)}
    write_evaluation(tmp_path, "srt", {"q": [0]}, **values, **{"eval/phrase_leak": 0.25})
    run = RunFolder(tmp_path)
    assert revision.mended_and_broken(run).loc["SRT"].to_dict() == {
        "wrong→right: revised": "10.0",
        "wrong→right: resampled": "30.0",
        "right→wrong: revised": "20.0",
        "right→wrong: resampled": "40.0",
    }
    leak, copy_rate = revision.copying(run).loc["SRT"][["phrase_leak", "copy_rate"]]
    assert leak == 0.25 and math.isnan(copy_rate)


def test_the_same_question_is_the_first_whose_answer_by_srt_speaks_of_revising(tmp_path):
    write_samples(tmp_path, "base", [sample_row("a", "base a"), sample_row("b", "base b")])
    write_samples(
        tmp_path, "srt", [sample_row("a", "srt a"), sample_row("c", "oops"), sample_row("b", "wait, b", 1, "new")]
    )
    run = RunFolder(tmp_path)
    told = samples.same_question(run)
    assert told.index("What is b?") < told.index("base b") < told.index("wait, b")
    assert "wrong, 7 tokens" in told and "correct, 7 tokens" in told and "oops" not in told
    assert "SRT, revised: correct" in samples.revisions(run, 1) and "srt a" not in samples.revisions(run, 1)
