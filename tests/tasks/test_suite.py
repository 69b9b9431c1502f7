"""Suite of several tasks: ids, limits, and verdicts of the right task in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.tasks import Chains, Countdown, Suite, Task
from sdzero.types import Question, Split, Verdict
from support.helpers import Toy
from support.runs import SMOKE, exit_code, read_json
from support.tiny_model import write_tiny_model


class Finite(Task):
    """Five questions; records the questions it verifies."""

    def __init__(self) -> None:
        self.asked: list[list[Question]] = []

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        if (num_questions or 0) > 5:
            raise ValueError("only 5")
        family = ("", "family", "finite/2", "", "")
        return [Question(f"finite/{i}", f"{split} {i}", str(i), {"i": i}, family[i]) for i in range(5)][:num_questions]

    def verify(self, question: Question, response: str) -> Verdict:
        return Verdict(1, "correct", response) if response == question.answer else Verdict(0, "unparseable")

    def verify_all(self, answers: Sequence[tuple[Question, str]]) -> list[Verdict]:
        self.asked.append([question for question, _ in answers])
        return super().verify_all(answers)

    def statement(self, question: Question) -> str:
        return f"{question.id}: {question.text}"


@cache
def suite() -> Suite:
    tasks = {"finite": Finite(), "chains-2": Chains(), "Count_down": Countdown()}
    return Suite(tasks, {"chains-2": 4, "Count_down": 3})


def test_questions_stand_one_benchmark_after_the_other() -> None:
    questions = suite().questions("eval", None)
    own = [("finite", q) for q in Finite().questions("eval", None)]
    own += [("chains-2", q) for q in Chains().questions("eval", 4)]
    own += [("Count_down", q) for q in Countdown().questions("eval", 3)]
    assert [q.id for q in questions] == [f"{name}/{q.id}" for name, q in own]
    assert [q.benchmark for q in questions] == [name for name, _ in own]
    assert [q.identity for q in questions] == [q.identity for _, q in own], "a training set must know them again"
    assert [(q.text, q.answer, q.meta) for q in questions] == [(q.text, q.answer, q.meta) for _, q in own]
    assert suite().questions("eval", 7) == questions[:7] and suite().questions("eval", 0) == []
    with pytest.raises(ValueError, match="num_questions=13, but the suite holds only 12"):
        suite().questions("eval", 13)


@given(st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["", "1", "A7", "right"])), max_size=30))
def test_verdicts_are_those_of_the_tasks_whatever_the_order(chosen: list[tuple[int, str]]) -> None:
    questions, tasks = suite().questions("eval", None), suite().benchmarks
    plain = {f"{name}/{q.id}": (task, q) for name, task in tasks.items() for q in task.questions("eval", 5)}
    answers = [(questions[i], questions[i].answer if said == "right" else said) for i, said in chosen]
    expected = [plain[q.id][0].verify(plain[q.id][1], said) for q, said in answers]
    assert suite().verify_all(answers) == expected
    assert [suite().verify(q, said) for q, said in answers] == expected


def test_each_task_is_asked_once_and_gets_its_own_questions_back() -> None:
    one, two = Finite(), Finite()
    both = Suite({"one": one, "two": two})
    questions = both.questions("eval", None)
    shuffled = [questions[i] for i in (7, 0, 2, 9, 1, 6)]
    assert [v.reward for v in both.verify_all([(q, "1") for q in shuffled])] == [0, 0, 0, 0, 1, 1]
    own = one.questions("eval", None)
    (asked_one,), (asked_two,) = one.asked, two.asked
    assert asked_one == [own[0], replace(own[2], family=""), own[1]], "a family of its own id is none"
    assert [q.id for q in asked_two] == ["finite/2", "finite/4", "finite/1"]
    assert both.statement(questions[8]) == "finite/3: eval 3"
    assert Suite({"one": one}).verify_all([]) == [] and len(one.asked) == 1


def test_limits_are_maxima_and_0_skips_a_benchmark() -> None:
    names = [q.benchmark for q in Suite({"a": Finite(), "b": Toy()}, 7).questions("eval", None)]
    assert (names.count("a"), names.count("b")) == (5, 7)
    names = [q.benchmark for q in Suite({"a": Finite(), "b": Finite()}, {"b": 2}).questions("eval", None)]
    assert (names.count("a"), names.count("b")) == (5, 2)
    both = Suite({"a": Toy(), "b": Toy()}, {"a": 0, "b": 2})
    assert [question.benchmark for question in both.questions("eval", None)] == ["b", "b"]


@pytest.mark.parametrize(
    ("benchmarks", "num_questions", "said"),
    [
        ({}, None, "task.benchmarks is empty"),
        ({"a/b": Toy()}, None, "invalid name 'a/b'"),
        ({"a": Toy()}, {"b": 1}, r"task.num_questions names \['b'\]"),
        ({"a": Toy()}, -1, "task.num_questions of 'a' must be non-negative"),
    ],
)
def test_invalid_options_are_refused(
    benchmarks: dict[str, Task], num_questions: dict[str, int] | int | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Suite(benchmarks, num_questions)


def test_refuses_training_splits_and_endless_tasks() -> None:
    with pytest.raises(ValueError, match="no split 'phase1'"):
        suite().questions("phase1", 3)
    with pytest.raises(ValueError, match="no end"):
        Suite({"toy": Toy()}).questions("eval", None)


def test_a_suite_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed table agrees with results.json."""
    task = tmp_path / "suite.yaml"
    task.write_text(
        "class_path: sdzero.tasks.Suite\n"
        "init_args:\n"
        "  benchmarks:\n"
        "    short: {class_path: sdzero.tasks.Chains, init_args: {min_ops: 1, max_ops: 1}}\n"
        "    longer: {class_path: sdzero.tasks.Chains, init_args: {min_ops: 2, max_ops: 2}}\n"
        "  num_questions: {short: 3, longer: 2}\n"
    )
    arguments = [
        *("--config", SMOKE / "eval.yaml", f"--model.student.path={write_tiny_model(tmp_path / 'model')}"),
        *(f"--trainer.default_root_dir={tmp_path}/a", f"--data.task={task}"),
        *("--data.evaluation={num_questions: null}", "--data.evaluation.num_samples=2"),
    ]
    assert exit_code(monkeypatch, "test", *arguments) == 0
    shown = capsys.readouterr().out
    results, rewards = read_json(tmp_path / "a/results.json"), read_json(tmp_path / "a/rewards.json")
    assert [id.split("/")[0] for id in rewards] == ["short"] * 3 + ["longer"] * 2
    for name, num in (("short", "3"), ("longer", "2"), ("average", "5")):
        key = f"eval/{'' if name == 'average' else f'{name}/'}avg_at_k"
        (line,) = (line.split() for line in shown.splitlines() if name in line.split())
        cells = [cell for cell in line if cell != "│"]
        assert cells[:3] == [name, num, f"{results[key]:.3f}"], shown
        assert cells[4] == f"{results[f'{key}_se']:.3f}"
    assert results["eval/avg_at_k"] == pytest.approx(
        (results["eval/short/avg_at_k"] + results["eval/longer/avg_at_k"]) / 2
    )
    assert "Test metric" not in shown, "Lightning's own table has a line for each of the metrics"
