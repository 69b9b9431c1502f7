"""`sdzero compare`: its metrics against a slow computation from the definitions, and its refusals."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.evaluation.compare import compare, find_evaluations
from sdzero.evaluation.statistics import Estimate
from support.made_up_run import write_json
from support.runs import exit_code, read_json, refusal


def by_hand(values: list[float]) -> Estimate:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def average_by_hand(estimates: list[Estimate]) -> Estimate:
    n = len(estimates)
    return sum(value for value, _ in estimates) / n, math.sqrt(sum(error * error for _, error in estimates)) / n


def made_up(rng: random.Random, questions: list[str], k: int) -> dict[str, list[int]]:
    """Rewards of k answers to each question, in random order."""
    return {question: [rng.randrange(2) for _ in range(k)] for question in rng.sample(questions, len(questions))}


@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(2, 6), min_size=1, max_size=4), k=st.integers(1, 4))
def test_metrics_against_the_definitions(seed: int, sizes: list[int], k: int) -> None:
    rng = random.Random(seed)
    questions = {f"b{i}": [f"b{i}/task/{j}" for j in range(size)] for i, size in enumerate(sizes)}
    every = [question for of_one in questions.values() for question in of_one]
    runs = {"first": made_up(rng, every, k), "second": made_up(rng, every, k + 1), "third": made_up(rng, every, k)}
    compared = compare(runs)
    assert [*compared] == [*runs]
    for name, comparison in compared.items():
        assert comparison.benchmarks.keys() == questions.keys()
        accuracies, differences = [], []
        for benchmark, metrics in comparison.benchmarks.items():
            means = [sum(runs[name][q]) / len(runs[name][q]) for q in questions[benchmark]]
            theirs = [sum(runs["first"][q]) / k for q in questions[benchmark]]
            accuracies.append(by_hand(means))
            differences.append(by_hand([a - b for a, b in zip(means, theirs, strict=True)]))
            assert metrics.questions == len(questions[benchmark])
            assert metrics.avg_at_k == pytest.approx(accuracies[-1])
            assert metrics.difference == (None if name == "first" else pytest.approx(differences[-1]))
        assert comparison.average.questions == sum(sizes)
        assert comparison.average.avg_at_k == pytest.approx(average_by_hand(accuracies))
        expected = None if name == "first" else pytest.approx(average_by_hand(differences))
        assert comparison.average.difference == expected


def write_runs(folder: Path) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    base, srt = {"x/1": [0, 0], "x/2": [1, 0], "y/1": [1, 1]}, {"x/1": [1, 0], "x/2": [1, 1], "y/1": [0, 1]}
    write_json(folder / "run/base/eval/rewards.json", base)
    write_json(folder / "run/srt/eval/rewards.json", srt)
    return base, srt


def test_runs_stages_and_evaluations_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, srt = write_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    assert [*find_evaluations(run).items()] == [("run/base", base), ("run/srt", srt)]
    for folder in ("run/srt", "run/srt/eval"):
        assert find_evaluations(Path(folder)) == {folder: srt}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path)
    file = tmp_path / "metrics.json"
    assert exit_code(monkeypatch, "compare", "run", "--json", file, cwd=tmp_path) == 0
    base, srt = (read_json(file)[f"run/{model}"] for model in ("base", "srt"))
    assert base["benchmarks"]["x"] == {"questions": 2, "avg_at_k": [0.25, 0.25], "difference": None}
    assert srt["benchmarks"]["x"] == {"questions": 2, "avg_at_k": [0.75, 0.25], "difference": [0.5, 0.0]}
    assert srt["benchmarks"]["y"] == {"questions": 1, "avg_at_k": [0.5, None], "difference": [-0.5, None]}
    assert srt["average"] == {"questions": 3, "avg_at_k": [0.625, None], "difference": [0.0, None]}
    shown = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["x", "2", "0.250", "±", "0.250", "0.750", "±", "0.250"] in shown and ["+0.500", "±", "0.000"] in shown
    assert ["average", "3", "0.625", "±", "-", "0.625", "±", "-"] in shown


def test_one_benchmark_needs_no_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_json(tmp_path / name / "rewards.json", {"x/1": [1], "x/2": [0]})
    assert exit_code(monkeypatch, "compare", "a", "b", cwd=tmp_path) == 0
    shown = capsys.readouterr().out
    assert "average" not in shown and "+0.000 ± 0.000" in shown


def test_other_questions_other_folders_and_the_same_one_twice_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "a/rewards.json", {"x/1": [1], "x/2": [0], "x/3": [0]})
    write_json(tmp_path / "b/rewards.json", {"x/1": [1], "x/4": [0]})
    a, b = tmp_path / "a", tmp_path / "b"
    message = refusal(capsys, monkeypatch, "compare", a, b)
    assert f"1 questions are only in {b} and 2 only in {a}" in message
    assert "has no rewards.json" in refusal(capsys, monkeypatch, "compare", a, tmp_path)
    assert "is named twice" in refusal(capsys, monkeypatch, "compare", a, a)
