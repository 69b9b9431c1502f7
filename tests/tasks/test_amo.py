from pathlib import Path

import pytest

from sdzero.tasks import AMOBench
from sdzero.tasks.hub import HubDataset
from support.fixtures.make import make
from support.fixtures.mathematics import AMO, AMO_ODD, AMO_TYPES
from support.rows import jsonl

DESCRIPTION = "its answer is a description, which needs a judge model"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> AMOBench:
    return AMOBench({"eval": HubDataset(str(make(tmp_path_factory.mktemp("hub"), AMO)), "test")})


def test_descriptions_are_set_aside_and_counted(task: AMOBench) -> None:
    questions = task.questions("eval", None)
    assert [q.id for q in questions] == [f"amobench/{n}" for n in range(24) if AMO_ODD.get(n) != "description"]
    assert task.set_aside == {DESCRIPTION: 3} and task.dropped == []


@pytest.mark.parametrize("kind", AMO_TYPES)
def test_the_other_types_are_graded(task: AMOBench, kind: str) -> None:
    questions = [q for q in task.questions("eval", None) if q.meta["answer_type"] == kind]
    right = [(q, f"### The final answer is: $\\boxed{{{q.answer}}}$") for q in questions]
    wrong = [(q, r"### The final answer is: $\boxed{-77}$") for q in questions]
    assert [v.reward for v in task.verify_all(right + wrong)] == [1] * len(questions) + [0] * len(questions)
    assert len(questions) >= 6


def test_prompts_contain_the_answer_format(task: AMOBench) -> None:
    assert all(q.text.endswith("is: $\\boxed{<your answer>}$") for q in task.questions("eval", None))


def test_unknown_answer_type_is_dropped(tmp_path: Path) -> None:
    kinds = {1: "number", 2: "number", 3: "riddle"}
    rows = [{"question_id": n, "prompt": f"q{n}", "answer": n, "answer_type": kind} for n, kind in kinds.items()]
    task = AMOBench({"eval": jsonl(tmp_path / "q.jsonl", rows)}, max_dropped_share=0.5)
    assert len(task.questions("eval", None)) == 2
    assert task.dropped[0][1] == (
        "column 'answer_type' is 'riddle', expected 'description' or one of ('number', 'set', 'variable')"
    )
