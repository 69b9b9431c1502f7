"""Tables of the evaluations of a made-up run."""

from __future__ import annotations

import math

import pytest

from sdzero.report import RunFolder, evaluations
from support.made_up_run import write_evaluation, write_lineage


@pytest.fixture
def folder(tmp_path):
    write_lineage(tmp_path)
    return tmp_path


def test_table_9_is_in_percent_and_shows_what_is_missing(folder):
    metrics = {"eval/revise_acc1": 0.5, "eval/revise_acc1_se": 0.0213, "eval/revise_correction_rate": -0.1}
    write_evaluation(folder, "base", {"q": [0, 1]}, **metrics)
    write_evaluation(folder, "srt", {"q": [0, 1]}, **{"eval/revise_tokens2": 32.16, "eval/revise_acc1_se": None})
    table = evaluations.table_9(RunFolder(folder))
    assert table.index.tolist() == ["base", "SRT"]
    assert table.loc["base"].tolist() == ["-", "-", "50.0 ± 2.1", "-", "-10.0"]
    assert table.loc["SRT"].tolist() == ["-", "32.2", "-", "-", "-"]


def test_revising_stands_beside_resampling(folder):
    run = RunFolder(folder)
    assert len(evaluations.table_9(run)) == len(evaluations.corrections(run)) == 0
    names = [f"{kind}_{flip}_rate" for kind in ("revise", "resample") for flip in ("wrong_to_right", "right_to_wrong")]
    values = {f"eval/{name}": value for name, value in zip(names, (0.1, 0.2, 0.3, 0.4), strict=True)}
    write_evaluation(folder, "srt", {"q": [0]}, **values, **{"eval/phrase_leak": 0.25})
    assert evaluations.corrections(run).loc["SRT"].to_dict() == {
        "wrong→right: revised": "10.0",
        "wrong→right: resampled": "30.0",
        "right→wrong: revised": "20.0",
        "right→wrong: resampled": "40.0",
    }
    leak, copy_rate = evaluations.copying(run).loc["SRT"][["phrase_leak", "copy_rate"]]
    assert leak == 0.25 and math.isnan(copy_rate)
