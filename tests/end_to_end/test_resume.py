"""A run that is killed at its worst moments ends as one that was not: the same weights and traces, to the bit."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from sdzero.pipeline import run as pipeline
from support.kills import kill_at
from support.runs import SMOKE, num_calls, read_json, records, refusal, scalars, sdzero, write_records


@pytest.fixture(scope="module")
def out(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has its base, and the evaluations that it will need where its models are the uninterrupted run's."""
    out = tmp_path_factory.mktemp("killed") / "run"
    shutil.copytree(smoke_run / "base", out / "base")
    for name in ("srt", "self_distill"):
        shutil.copytree(smoke_run / name / "eval", out / name / "eval")
    shutil.copy(smoke_run / "lineage.json", out)
    write_records(out, {name: r for name, r in records(out).items() if name == "base" or name.endswith("eval")})
    return out


def test_killed_again_and_again(
    smoke_run: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = num_calls(out)
    monkeypatch.setattr(pipeline, "LOCK_SECONDS", 0.2)

    def second_run() -> None:
        assert "another run is at work" in refusal(capsys, monkeypatch, "run", SMOKE, "--out", out)

    # in collect, after the second of its eight calls, everything at once
    killed = kill_at(out, "fsync=2", "group", second_run)
    assert killed.code == -signal.SIGKILL
    assert "collect/journal/00000-revision.jsonl" in killed.files and "collect/traces.jsonl" not in killed.files

    # in SRT, once step 2 is in a checkpoint, the stage alone: the run says which stage died, and ends
    killed = kill_at(out, "replace=step=2.ckpt.sha256.json", "stage")
    assert killed.code == 1 and "stage srt ended with exit code -9" in killed.said
    assert (out / "collect/traces.jsonl").read_bytes() == (smoke_run / "collect/traces.jsonl").read_bytes()

    # in SD, once step 2 is in a checkpoint, the run alone: its orphan ends by itself
    killed = kill_at(out, "replace=step=2.ckpt.sha256.json", "run")
    assert killed.code == -signal.SIGKILL and "resuming from" in killed.said and "step=2.ckpt" in killed.said
    assert "srt/model/sdzero.json" in killed.files and "self_distill/model/sdzero.json" not in killed.files

    # in SD, after its last checkpoint and before its export: there is nothing left to train
    killed = kill_at(out, "replace=step=5.ckpt.sha256.json", "group")
    assert "resuming from" in killed.said and "self_distill/model/sdzero.json" not in killed.files

    done = sdzero("run", SMOKE, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resuming from") == 1 and "step=5.ckpt" in done.stdout

    whole, resumed = read_json(smoke_run / "summary.json"), read_json(out / "summary.json")
    assert [row["weights_sha256"] for row in resumed] == [row["weights_sha256"] for row in whole]
    assert [{**row, "seconds": 0} for row in resumed] == [{**row, "seconds": 0} for row in whole]
    assert (out / "collect/traces.jsonl").read_bytes() == (smoke_run / "collect/traces.jsonl").read_bytes()
    assert before <= num_calls(out) <= num_calls(smoke_run) + 4

    for name, first_steps in (("srt", [0, 2]), ("self_distill", [0, 2])):
        curves = [curve for curve in scalars(out / name, "train/loss") if curve]
        assert [curve[0][0] for curve in curves] == first_steps, "a restart goes on from its checkpoint"
        whole = dict(scalars(smoke_run / name, "train/loss")[0])
        assert all(whole[step] == value for curve in curves for step, value in curve)
