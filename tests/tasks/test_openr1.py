"""OpenR1-Math on made-up rows with its columns: selection, exclusions by reason, and splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdzero.tasks import OpenR1Math
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.openr1 import COMPETITIONS
from sdzero.tasks.splits import Sizes
from sdzero.types import Split
from support.fixtures.make import make
from support.fixtures.mathematics import OPENR1, OPENR1_ODD, openr1_row, uuid_of
from support.fixtures.repository import rename_column
from support.rows import collect_config
from support.runs import refusal

PHASES: tuple[Split, ...] = ("phase1", "phase2", "eval")
ALL = Sizes(20, 15, 5)
NO_ANSWER, UNVERIFIED, OTHER = (
    "it asks for a proof, or has no answer",
    "no generation was verified",
    "its source is not in task.sources",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make(tmp_path_factory.mktemp("hub"), OPENR1))


def task(folder: str, **options: Any) -> OpenR1Math:
    path = HubDataset(folder, columns=("solution",), streaming=True)
    return OpenR1Math(**{"path": path, "sizes": ALL, "max_dropped_share": 0.1, **options})


def asked(task: OpenR1Math) -> set[str]:
    return {q.id.removeprefix("openr1math/") for phase in PHASES for q in task.questions(phase, None)}


def expected(sources: tuple[str, ...] | None, verified: bool) -> tuple[set[str], Counter[str]]:
    """Compute the selected uuids and the number of exclusions by reason from the list of odd rows."""
    unverified = {
        "correctness_math_verify and correctness_llama are null",
        "no generation is right",
        "generations and their lists are empty",
    }
    kept: set[str] = set()
    problems: set[str] = set()
    aside: Counter[str] = Counter()
    for number in range(40):
        row, why = openr1_row(number), OPENR1_ODD.get(uuid_of(number), "")
        problem = "".join(row["problem"].lower().split())
        if sources and row["source"] not in sources:
            aside[OTHER] += 1
        elif why in ("answer is proof", "answer is notfound"):
            aside[NO_ANSWER] += 1
        elif verified and why in unverified:
            aside[UNVERIFIED] += 1
        elif why != "answer cannot be graded" and problem not in problems:
            kept.add(row["uuid"])
            problems.add(problem)
    return kept, aside


@pytest.mark.parametrize("sources", [COMPETITIONS, ("olympiads", "amc_aime"), None])
@pytest.mark.parametrize("verified", [True, False])
def test_which_rows_are_asked(folder: str, sources: tuple[str, ...] | None, verified: bool) -> None:
    chosen = task(folder, sources=sources, verified=verified)
    assert (asked(chosen), chosen.set_aside) == expected(sources, verified)
    assert all("gold answer '\\\\text{}'" in reason for _, reason in chosen.dropped)


def test_a_questions_id_answer_and_solution(folder: str) -> None:
    questions = {q.id: q for phase in PHASES for q in task(folder).questions(phase, None)}
    question, row = questions[f"openr1math/{uuid_of(3)}"], openr1_row(3)
    assert (question.answer, question.meta["solution"]) == (row["answer"], row["solution"])
    assert question.text.startswith(row["problem"]) and question.text.endswith(r"within \boxed{}.")
    assert "generations" not in question.meta and "messages" not in question.meta  # gigabytes, which are not read
    assert questions[f"openr1math/{uuid_of(38)}"].answer == "B"


def test_phases_follow_the_published_order_and_share_nothing(folder: str) -> None:
    dealt = {phase: [q.id for q in task(folder).questions(phase, None)] for phase in PHASES}
    order = [f"openr1math/{uuid_of(number)}" for number in range(40)]
    first, second = (dealt[phase] for phase in ("phase1", "phase2"))
    assert first + second == sorted(first + second, key=order.index)
    assert len(dealt["eval"]) == 5 and not {*dealt["eval"]} & {*first, *second}
    other = {phase: [q.id for q in task(folder, sizes=Sizes(3, 9, 5)).questions(phase, None)] for phase in PHASES}
    assert other["eval"] == dealt["eval"] and other["phase1"] == first[:3]


def test_the_extended_configuration_has_other_sources(folder: str) -> None:
    extended = HubDataset(folder, config="extended", columns=())
    assert all(q.meta["source"] != "cn_k12" for q in task(folder, path=extended).questions("phase1", None))
    school = task(folder, path=extended, sources=("cn_k12",))
    assert asked(school) == {uuid_of(n) for n in range(100, 121) if openr1_row(n)["source"] == "cn_k12"}
    with pytest.raises(ValueError, match=r"task.sources: .*has no source 'cn_k13'; it has \['amc_aime', 'aops_forum'"):
        task(folder, path=extended, sources=("cn_k13",)).questions("phase1", None)


@pytest.mark.parametrize(
    ("column", "key"),
    [("problem", "task.question_column"), ("correctness_math_verify", "task.verified"), ("source", "task.sources")],
)
def test_a_changed_schema_fails_at_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, column: str, key: str
) -> None:
    changed = make(tmp_path, OPENR1)
    rename_column(changed, column, "other")
    config = collect_config(tmp_path, "sdzero.tasks.OpenR1Math", path={"id": str(changed), "columns": []})
    said = refusal(capsys, monkeypatch, "collect", "--config", config)
    assert f"{key}: {changed} (train) has no column '{column}'; it has [" in said and "'other'" in said
