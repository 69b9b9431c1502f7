"""Demonstrations against an independent, slow reader of the made-up files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sdzero.graders.sandbox.types import CodeVerdict, Language, Limits, StdioTest, Submission
from sdzero.prompts import PromptBuilder
from sdzero.tasks import Codeforces, Rows
from sdzero.tasks.base import TraceSource
from sdzero.tasks.demonstrations import CodeforcesDemonstrations, Demonstrations, OpenR1Demonstrations
from sdzero.tasks.hub import HubDataset
from sdzero.tasks.sources import Source
from sdzero.types import Question, Trace, Verdict
from support.fixtures.make import make
from support.fixtures.mathematics import OPENR1, uuid_of
from support.fixtures.programs import CODEFORCES, CPP, PYTHON, TRACES, program
from support.rows import from_config, jsonl
from support.tiny_model import tiny_tokenizer

LANGUAGES: tuple[Language, ...] = ("cpp", "python")
Row = dict[str, Any]


class Listed(Rows):
    """OpenR1-Math's questions without grading processes."""

    def verify(self, question: Question, response: str) -> Verdict:
        raise AssertionError("a demonstration is not graded")


class ReadingSandbox:
    """Sandbox double: recognizes a made-up program by its expression and computes its output."""

    asked: list[int]

    def __init__(self, *args: Any) -> None:
        self.asked = []

    def grade(self, submissions: Sequence[Submission]) -> list[CodeVerdict]:
        self.asked.append(len(submissions))
        return [
            CodeVerdict(1, "correct", "reading") if self.is_right(one) else CodeVerdict(0, "wrong", "reading")
            for one in submissions
        ]

    def is_right(self, submission: Submission) -> bool:
        said = CPP if submission.language == "cpp" else PYTHON
        [place] = [place for place, expression in enumerate(said) if expression in submission.source]
        for test in submission.tests:
            assert isinstance(test, StdioTest)
            a, b = map(int, test.input.split())
            if int(test.output) != (a + b, a * b, max(a, b), min(a, b))[place]:
                return False
        return True


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use the sandbox double and a private verdict cache."""
    monkeypatch.setattr("sdzero.tasks.code.SandboxClient", ReadingSandbox)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations")
    for id in (OPENR1, CODEFORCES, TRACES):
        make(folder, id)
    return folder


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(tiny_tokenizer())


def texts(traces: Sequence[Trace], builder: PromptBuilder) -> dict[str, str]:
    """Return the solution trained on, by question id."""
    assert all(trace.revised_ids[-1] == builder.end_id for trace in traces)
    return {trace.question.id: builder.tokenizer.decode(trace.revised_ids[:-1]) for trace in traces}


# --- OpenR1-Math ----------------------------------------------------------------------------------


def openr1(folder: Path, **options: Any) -> OpenR1Demonstrations:
    source = HubDataset(str(folder / OPENR1), config="default")
    task = Listed({"phase1": source}, "problem", None, "uuid")
    path = HubDataset(str(folder / OPENR1), config="default", columns=())
    return OpenR1Demonstrations(task, **{"path": path, **options})


def first_right(folder: Path) -> dict[str, str]:
    """Return the first correct and complete generation, by uuid."""
    found: dict[str, str] = {}
    for file in sorted((folder / OPENR1 / "data").glob("train-*")):
        for row in pq.read_table(file).to_pylist():
            for place in range(len(row["generations"] or [])):
                right = (row["correctness_math_verify"] or [None] * 9)[place]
                complete = (row["is_reasoning_complete"] or [None] * 9)[place]
                reason = (row["finish_reasons"] or [None] * 9)[place]
                if right and complete in (True, None) and reason in ("stop", None):
                    found.setdefault(row["uuid"], row["generations"][place])
    return found


def test_first_correct_and_complete_generation(folder: Path, builder: PromptBuilder) -> None:
    source = openr1(folder)
    traces = source.traces(builder)
    expected = first_right(folder)
    questions = source.task.questions("phase1", None)
    by_id = {f"listed/{uuid}": text for uuid, text in expected.items()}
    wanted = {q.id: by_id[q.id] for q in questions if q.id in by_id}
    assert texts(traces, builder) == wanted
    assert [trace.question for trace in traces] == [question for question in questions if question.id in wanted]
    assert all(trace.prompt_ids == builder.prompt(trace.question).token_ids for trace in traces)
    assert all((trace.init_ids, trace.bridge_ids, trace.reward) == ((), (), None) for trace in traces)
    assert dict(source.set_aside) == {"no correct and complete solution": len(questions) - len(wanted)}
    for odd in (31, 33, 36):  # flags are null, none is right, there are none
        assert f"listed/{uuid_of(odd)}" not in wanted
    for odd in (32, 34, 35):  # a flag is null, one was cut, reasons are null
        assert f"listed/{uuid_of(odd)}" in wanted


def test_a_cut_generation_is_passed_over(tmp_path: Path, builder: PromptBuilder) -> None:
    row: Row = {"uuid": "u", "problem": "p", "generations": [*"abcde"]}
    row["correctness_math_verify"] = [False, True, True, True, True]
    row |= {"is_reasoning_complete": [True, False, True, True], "finish_reasons": [None, "stop", "length"]}
    path = jsonl(tmp_path / "q.jsonl", [row])
    traces = OpenR1Demonstrations(Listed({"phase1": path}, "problem", None, "uuid"), path=path).traces(builder)
    assert texts(traces, builder) == {"listed/u": "d"}


def test_without_thoughts(folder: Path, builder: PromptBuilder) -> None:
    whole, short = (texts(openr1(folder, thoughts=kept).traces(builder), builder) for kept in (True, False))
    assert whole.keys() == short.keys()
    assert all(text.startswith("<think>") and text.endswith(short[id]) for id, text in whole.items())
    assert not any("think>" in text for text in short.values())


def test_num_questions_limits_the_traces(folder: Path, builder: PromptBuilder) -> None:
    source = openr1(folder, num_questions=5)
    assert [t.question for t in source.traces(builder)] == source.task.questions("phase1", 5)


def test_longer_traces_are_set_aside(folder: Path, builder: PromptBuilder) -> None:
    lengths = sorted(len(t.prompt_ids) + len(t.revised_ids) for t in openr1(folder).traces(builder))
    middle = lengths[len(lengths) // 2]
    source = openr1(folder, max_tokens=middle)
    traces = source.traces(builder)
    assert sorted(len(t.prompt_ids) + len(t.revised_ids) for t in traces) == [n for n in lengths if n <= middle]
    assert source.set_aside[f"more than {middle} tokens"] == sum(n > middle for n in lengths) > 0
    assert source.traces(builder) == traces
    assert source.set_aside[f"more than {middle} tokens"] == sum(n > middle for n in lengths), "counted once"


def test_what_is_held_out_is_not_trained_on(folder: Path) -> None:
    split: Any = "eval"
    with pytest.raises(ValueError, match="data.source.split must be phase1 or phase2, got 'eval'"):
        openr1(folder, split=split)


def test_solutions_of_another_data_set(tmp_path: Path, folder: Path, builder: PromptBuilder) -> None:
    row = {"uuid": "u", "generations": ["a"], "correctness_math_verify": [True]}
    path = jsonl(tmp_path / "q.jsonl", [{**row, "is_reasoning_complete": [True], "finish_reasons": ["stop"]}])
    with pytest.raises(ValueError, match=r"data.source.path: no solution for any of 3 questions of split 'phase1'"):
        openr1(folder, path=path, num_questions=3).traces(builder)
    with pytest.raises(ValueError, match=r"data.source.path: .*q.jsonl has no column 'is_reasoning_complete'"):
        openr1(folder, path=jsonl(tmp_path / "q.jsonl", [row])).traces(builder)


# --- codeforces-cots ------------------------------------------------------------------------------


def cots(folder: Path) -> dict[Language, Source]:
    return {
        "cpp": HubDataset(str(folder / TRACES), config="solutions", columns=()),
        "python": HubDataset(str(folder / TRACES), config="solutions_py", columns=()),
    }


def codeforces(folder: Path, languages: tuple[Language, ...] = LANGUAGES, **options: Any) -> Codeforces:
    source = HubDataset(str(folder / CODEFORCES), config="verifiable")
    return Codeforces({"phase1": source}, languages, sizes=None, **options)


def slow_candidates(folder: Path) -> dict[str, list[str]]:
    """Return the complete generations with a block of the language, by question id."""
    found: dict[str, list[str]] = {}
    for language, config in (("cpp", "solutions"), ("python", "solutions_py")):
        for file in sorted((folder / TRACES / config).iterdir()):
            for row in pq.read_table(file).to_pylist():
                if row["finish_reason"] == "stop" and f"```{language}\n" in row["generation"]:
                    found.setdefault(f"codeforces/{row['id']}/{language}", []).append(row["generation"])
    return found


@pytest.mark.parametrize("verified", [False, True])
def test_the_first_program(folder: Path, builder: PromptBuilder, verified: bool) -> None:
    task = codeforces(folder)
    source = CodeforcesDemonstrations(task, path=cots(folder), verified=verified)
    expected: dict[str, str] = {}
    for id, generations in slow_candidates(folder).items():
        _, contest, _, language = id.split("/")
        right = program(int(contest) - 800, language)
        for generation in generations:
            if not verified or re.findall(rf"```{language}\n(.*?)```", generation, re.DOTALL)[-1] == right:
                expected.setdefault(id, generation)
    questions = task.ungraded_questions("phase1", None)
    wanted = {q.id: expected[q.id] for q in questions if q.id in expected}
    assert texts(source.traces(builder), builder) == wanted
    assert source.set_aside.total() == len(questions) - len(wanted)
    assert "codeforces/800/A/cpp" in wanted and "codeforces/819/A/python" not in wanted  # cut
    assert ("codeforces/818/A/python" in wanted) == (not verified)  # wrong
    assert "codeforces/700/A/cpp" not in wanted  # no question


def write_cots(path: Path, programs: Sequence[tuple[str, str | None]]) -> str:
    said = "<think>\n```cpp\n```\n</think>\n"
    rows = [
        {"id": id, "finish_reason": "stop" if source else "length", "generation": f"{said}{source or block(0)}"}
        for id, source in programs
    ]
    return jsonl(path, rows)


def block(number: int) -> str:
    return f"```cpp\n{program(number, 'cpp')}```"


def test_verified_solutions_are_judged_in_turn_and_cached(tmp_path: Path, folder: Path, builder: PromptBuilder) -> None:
    """Each call judges one program per question that has no correct one yet."""
    programs = [("800/A", "no program"), *(("800/A", block(number)) for number in (1, 2, 0, 0))]
    programs = [*programs, ("801/A", block(1)), ("801/A", block(3)), ("802/A", block(1)), ("803/A", None)]
    path: dict[Language, Source] = {"cpp": write_cots(tmp_path / "cots.jsonl", programs)}

    def read(**options: Any) -> tuple[list[int], list[Trace]]:
        task = codeforces(folder, ("cpp",), **options)
        source = CodeforcesDemonstrations(task, path=path, verified=True, thoughts=False, num_questions=4)
        traces = source.traces(builder)
        fake: Any = task._sandbox
        return fake.asked, traces

    asked, traces = read()
    assert asked == [3, 1, 1]
    assert texts(traces, builder) == {"codeforces/800/A/cpp": block(0), "codeforces/801/A/cpp": block(1)}
    assert read() == ([], traces), "the verdicts are kept"
    assert read(limits=Limits(time=9)) == ([3, 1, 1], traces), "judging in another way has verdicts of its own"


def test_unverified_solutions_need_no_tests(
    folder: Path, builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("no file of generated tests is needed")

    monkeypatch.setattr("sdzero.tasks.codeforces.hub_files", refuse)
    assert CodeforcesDemonstrations(codeforces(folder), path=cots(folder)).traces(builder)


def test_a_language_without_solutions(folder: Path) -> None:
    with pytest.raises(ValueError, match="data.source.path has no solutions in python, one of data.source.task"):
        CodeforcesDemonstrations(codeforces(folder), path={"cpp": cots(folder)["cpp"]})
    CodeforcesDemonstrations(codeforces(folder, ("cpp",)), path={"cpp": cots(folder)["cpp"]})


def test_in_a_config(folder: Path, builder: PromptBuilder) -> None:
    init = {"path": {"phase2": {"id": str(folder / CODEFORCES), "config": "verifiable"}}, "sizes": None}
    given = {
        "task": {"class_path": "sdzero.tasks.Codeforces", "init_args": {**init, "languages": ["python"]}},
        "split": "phase2",
        "num_questions": 3,
        "path": {"python": {"id": str(folder / TRACES), "config": "solutions_py"}},
    }
    source = from_config("sdzero.tasks.demonstrations.CodeforcesDemonstrations", TraceSource, **given)
    assert isinstance(source, Demonstrations)
    assert [t.question.id for t in source.traces(builder)] == [f"codeforces/80{number}/A/python" for number in range(3)]
