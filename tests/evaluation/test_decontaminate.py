"""Overlap of benchmarks with training questions, against a comparison of every pair."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.evaluation.decontaminate import N, Overlap, letters, overlaps, passages, report
from support.made_up_run import write_json
from support.rows import jsonl
from support.runs import ROOT, exit_code, refusal

WORDS = ("one", "Two", "three,")
texts = st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join) | st.text(max_size=6)


def slowly(benchmark: dict[str, str], training: dict[str, str]) -> set[Overlap]:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[^\W_]+", text.casefold())
        return {tuple(words[n : n + N]) for n in range(len(words)) if n + N <= len(words)}

    found = set()
    for name, text in benchmark.items():
        for other, trained in training.items():
            exact = letters(text) == letters(trained) != ""
            shared = len(grams(text) & grams(trained))
            if exact or shared:
                found.add(Overlap(name, other, exact, shared))
    return found


@given(st.lists(texts, max_size=6), st.lists(texts, max_size=6))
def test_every_pair_that_shares_text_is_found(benchmark: list[str], training: list[str]) -> None:
    held_out, trained = (
        {f"{k}{n}": text for n, text in enumerate(each)} for k, each in (("b", benchmark), ("t", training))
    )
    found = overlaps(held_out, trained)
    assert len(found) == len({*found}) and {*found} == slowly(held_out, trained)


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("What is $2+3$?", "what is 2 + 3", True),
        ("What is $2+3$?", "What is $2-3$?", True),  # signs do not count: better one too many
        ("What is 2?", "What is 3?", False),
        ("Straße", "STRASSE", True),
        ("?!", "...", False),
        ("", "", False),
    ],
)
def test_exact_is_the_same_letters_and_digits(text: str, other: str, same: bool) -> None:
    assert [pair.exact for pair in overlaps({"b": text}, {"t": other})] == [True] * same


def test_a_passage_is_thirteen_words() -> None:
    words = [f"w{number}" for number in range(14)]
    assert [*passages(" ".join(words))] == [" ".join(words[:13]), " ".join(words[1:])]
    assert [*passages(" ".join(words[:12]))] == []
    inside = f"Before. {', '.join(words[:13]).upper()}; after it"
    assert overlaps({"b": " ".join(words)}, {"t": inside}) == [Overlap("b", "t", False, 1)]


def test_the_metrics_of_a_benchmark() -> None:
    long = " ".join(f"word{number}" for number in range(20))
    benchmark = {"b1": long, "b2": "Short one?", "b3": "Another one", "b4": f"Hidden: {long}!"}
    training = {"phase1": {"t1": long, "t2": "SHORT ONE"}, "phase2": {"t3": f"{long} more"}}
    metrics = report({"made": benchmark, "none": {}}, training)
    row = metrics["benchmarks"]["made"]
    counts = {"questions": 4, "short": 2, "exact": 2, "passages": 2, "overlapping": 3, "share": 0.75}
    assert {key: value for key, value in row.items() if key != "pairs"} == counts
    assert [(pair["benchmark"], pair["training"], pair["exact"], pair["passages"]) for pair in row["pairs"]] == [
        ("b1", "t1", True, 8),
        ("b4", "t1", False, 8),
        ("b2", "t2", True, 0),
        ("b1", "t3", False, 8),
        ("b4", "t3", False, 8),
    ]
    assert metrics["training"] == {"phase1": 2, "phase2": 1} and metrics["benchmarks"]["none"]["share"] == 0.0


def test_many_questions_take_seconds() -> None:
    random, words = Random(0), [f"w{number}" for number in range(3000)]
    some = {str(number): " ".join(random.choices(words, k=60)) for number in range(12_000)}
    start = time.process_time()
    found = overlaps({id: some[id] for id in [*some][:3000]}, some)
    assert len(found) == 3000 and time.process_time() - start < 20


# --- a recipe -------------------------------------------------------------------------------------

LONG = "How many ways are there to put seven made up stones into three made up bags"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose two benchmarks hold one training question of phase 1 word for word, and one of phase 2 in part."""

    def task(name: str, **questions: list[str]) -> dict[str, Any]:
        """A task of these questions by split."""
        files = {
            split: jsonl(tmp_path / f"{name}-{split}.jsonl", [{"question": text, "answer": "1"} for text in texts])
            for split, texts in questions.items()
        }
        return {"class_path": "sdzero.tasks.Math", "init_args": {"path": files, "question_column": "question"}}

    phase1, phase2 = (f"Made up: {n} + {n}?" for n in (1, 2, 3)), [f"{LONG}, and then out?", "Made up: 4 + 4?"]
    benchmarks = {"first": "first.yaml", "second": "second.yaml"}
    files = {
        "task.yaml": task("trained", phase1=[*phase1], phase2=phase2),
        "first.yaml": task("first", eval=["made up: 2 + 2", "Made up: 9 + 9?"]),
        "second.yaml": task("second", eval=[f"{LONG}?"]),
        "suite.yaml": {"class_path": "sdzero.tasks.Suite", "init_args": {"benchmarks": benchmarks}},
        "recipe/recipe.yaml": {
            "stages": {"base": {"trains": False}, "collect": {"command": "collect"}, "self_distill": {}}
        },
        "recipe/collect.yaml": {"task": "../task.yaml", "num_questions": 3},
        "recipe/self_distill.yaml": {"data": {"init_args": {"task": "../task.yaml", "num_questions": 2}}},
        "recipe/eval.yaml": {"data": {"init_args": {"task": "../suite.yaml", "evaluation": {"num_questions": None}}}},
    }
    for name, content in files.items():
        write_json(tmp_path / name, content)
    return tmp_path / "recipe"


def test_a_recipes_report(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert exit_code(monkeypatch, "decontaminate", recipe, "--json", recipe / "overlap.json") == 0
    shown = capsys.readouterr().out
    assert "3 of phase1 and 2 of phase2" in shown and "compared as a whole only" in shown
    lines = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│")}
    assert "50.0%" in lines["first"] and "100.0%" in lines["second"]
    metrics = json.loads((recipe / "overlap.json").read_text())
    assert metrics["training"] == {"phase1": 3, "phase2": 2}
    pairs = {name: row["pairs"] for name, row in metrics["benchmarks"].items()}
    assert [(pair["exact"], pair["passages"]) for pair in pairs["first"]] == [(True, 0)]
    assert [(pair["exact"], pair["passages"]) for pair in pairs["second"]] == [(False, 4)]
    assert pairs["first"][0]["benchmark"].startswith("first/math/")
    assert pairs["first"][0]["training"].startswith("math/")


def test_only_what_is_trained_on_counts(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe / "collect.yaml").write_text(json.dumps({"task": "../task.yaml", "num_questions": 1}))
    assert exit_code(monkeypatch, "decontaminate", recipe, "--json", recipe / "overlap.json") == 0
    metrics = json.loads((recipe / "overlap.json").read_text())
    assert metrics["training"]["phase1"] == 1 and metrics["benchmarks"]["first"]["overlapping"] == 0


def test_what_is_no_recipe_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe / "eval.yaml").write_text("{}")
    message = refusal(capsys, monkeypatch, "decontaminate", recipe)
    assert "eval.yaml: data.init_args.task is missing" in message
    (recipe / "eval.yaml").unlink()
    assert "evaluation: there is no" in refusal(capsys, monkeypatch, "decontaminate", recipe)


def test_it_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv[1:] = ['decontaminate', 'configs/recipes/quickstart']\n"
        "from sdzero.cli.main import main; main()\n"
        "assert not {'torch', 'transformers', 'lightning'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1600 of phase1 and 1920 of phase2" in done.stdout, done.stderr
