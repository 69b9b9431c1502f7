"""The made-up data sets load as the real ones would, with the very columns and types, and their odd rows are odd."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import datasets
import pytest

from support.fixtures import benchmarks, livecodebench, mathematics, programs
from support.fixtures.make import MAKERS, make
from support.fixtures.repository import rename_column

INTS, BOOLS, STRINGS = "[int64]", "[bool]", "[string]"


def strings(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "string")


TESTS, MESSAGES = [strings("input output")], [strings("content role")]
OPENR1 = {
    **strings("problem solution answer problem_type question_type source uuid"),
    **{"generations": STRINGS, "finish_reasons": STRINGS, "correctness_count": "int64", "messages": MESSAGES},
    **dict.fromkeys(("is_reasoning_complete", "correctness_math_verify", "correctness_llama"), BOOLS),
}
STATEMENT = {
    **strings("id contest_id contest_name contest_type index title description"),
    **strings("input_format output_format interaction_format note editorial"),
    **dict.fromkeys(("contest_start", "contest_start_year"), "int64"),
    **{"aliases": STRINGS, "time_limit": "float64", "memory_limit": "float64", "examples": TESTS},
}
CODEFORCES = {
    **STATEMENT,
    **strings("input_mode generated_checker"),
    **dict.fromkeys(("rating", "testset_size", "generated_tests"), "int64"),
    **{"tags": STRINGS, "official_tests": TESTS, "official_tests_complete": "bool", "executable": "bool"},
}
PROMPTS = {**CODEFORCES, **strings("language prompt")}
TRACES = {**STATEMENT, "memory_limit": "int64", **strings("prompt generation finish_reason"), "messages": MESSAGES}
LIVECODEBENCH = strings(
    "question_title question_content platform question_id contest_id contest_date starter_code difficulty "
    "public_test_cases private_test_cases metadata"
)
COUNTED = (
    "num_highlights num_words num_placeholders num_bullets num_sections capital_frequency num_paragraphs let_frequency "
    "frequency num_sentences nth_paragraph"
)
IFEVAL_KWARGS = {
    **strings("relation prompt_to_repeat section_spliter capital_relation language let_relation letter end_phrase"),
    **strings("keyword postscript_marker first_word"),
    **dict.fromkeys(("keywords", "forbidden_words"), STRINGS),
    **dict.fromkeys(COUNTED.split(), "int64"),
}
IFEVAL = {"key": "int64", "prompt": "string", "instruction_id_list": STRINGS, "kwargs": [IFEVAL_KWARGS]}
IFBENCH_KWARGS = {
    "keyword": "string",
    "percentage": "float64",
    **dict.fromkeys(("N", "max_words", "min_words"), "int64"),
}
IFBENCH = {**strings("key prompt"), "instruction_id_list": STRINGS, "kwargs": [IFBENCH_KWARGS]}
MMLU = {**strings("question subject"), "choices": STRINGS, "answer": "A|B|C|D"}
MMLU_PRO = {
    **{"question_id": "int64", "options": STRINGS, "answer_index": "int64"},
    **strings("question answer cot_content category src"),
}
MATH500 = {**strings("problem solution answer subject unique_id"), "level": "int64"}
HMMT = {"problem_idx": "int64", **strings("problem answer"), "problem_type": STRINGS}
AMO = {"question_id": "int64", **strings("prompt solution answer answer_type")}
# (id, configuration, split, rows, columns)
SETS: list[tuple[str, str | None, str, int, dict[str, Any]]] = [
    (mathematics.OPENR1, None, "train", 40, OPENR1),
    (mathematics.OPENR1, "default", "train", 40, OPENR1),
    (mathematics.OPENR1, "extended", "train", 21, OPENR1),
    (mathematics.OPENR1, "all", "default", 40, OPENR1),
    (mathematics.OPENR1, "all", "extended", 21, OPENR1),
    (programs.CODEFORCES, None, "train", 39, CODEFORCES),
    (programs.CODEFORCES, "default", "test", 6, CODEFORCES),
    (programs.CODEFORCES, "verifiable", "train", 35, CODEFORCES),
    (programs.CODEFORCES, "verifiable", "test", 6, CODEFORCES),
    (programs.CODEFORCES, "verifiable-prompts", "train", 70, PROMPTS),
    (programs.CODEFORCES, "verifiable-prompts", "test", 12, PROMPTS),
    (programs.TRACES, "solutions", "train", 40, TRACES),
    (programs.TRACES, "solutions_py", "train", 20, TRACES),
    (mathematics.COUNTDOWN, None, "train", 40, {"target": "int64", "nums": INTS}),
    (mathematics.AIME24, None, "test", 30, {"id": "int64", **strings("problem solution url")}),
    (mathematics.AIME24_H4, None, "train", 30, {"id": "int64", **strings("problem solution answer url year")}),
    (mathematics.AIME25, None, "test", 30, strings("problem answer id")),
    (mathematics.HMMT, None, "train", 30, HMMT),
    (mathematics.AMO, None, "test", 24, AMO),
    (mathematics.MATH500, None, "test", 30, MATH500),
    (livecodebench.LIVECODEBENCH_PARQUET, "release_v1", "test", 6, LIVECODEBENCH),
    (livecodebench.LIVECODEBENCH_PARQUET, "release_latest", "test", 36, LIVECODEBENCH),
    (livecodebench.LIVECODEBENCH_PARQUET, "v6", "test", 6, LIVECODEBENCH),
    (benchmarks.IFEVAL, None, "train", 30, IFEVAL),
    (benchmarks.IFBENCH, None, "train", 30, IFBENCH),
    (benchmarks.MMLU, "all", "test", 30, MMLU),
    (benchmarks.MMLU_PRO, None, "test", 30, MMLU_PRO),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for id in MAKERS:
        make(folder, id)
    return folder


def said(feature: Any) -> Any:
    if isinstance(feature, datasets.ClassLabel):
        return "|".join(feature.names)
    if isinstance(feature, datasets.List):
        inner = said(feature.feature)
        return [inner] if isinstance(inner, dict) else f"[{inner}]"
    if isinstance(feature, dict):
        return {name: said(inner) for name, inner in feature.items()}
    return feature.dtype


def load(folder: Path, config: str | None, split: str, cache: Path, **options: Any) -> Any:
    return datasets.load_dataset(str(folder), config, split=split, cache_dir=str(cache), **options)


@pytest.mark.parametrize(("id", "config", "split", "num_rows", "columns"), SETS)
def test_a_set_loads_with_the_columns_and_types_of_the_real_one(
    made: Path, tmp_path: Path, id: str, config: str | None, split: str, num_rows: int, columns: dict[str, Any]
) -> None:
    data = load(made / id, config, split, tmp_path)
    assert {name: said(feature) for name, feature in data.features.items()} == columns
    assert len(data) == num_rows
    text = next((name for name in ("problem", "description", "prompt", "question") if name in columns), None)
    if text:
        assert all(row[text].startswith("Made up:") for row in data)


def test_every_maker_is_tested_and_makes_the_same_again(made: Path, tmp_path: Path) -> None:
    assert {*MAKERS} == {id for id, *_ in SETS} | {livecodebench.LIVECODEBENCH}
    for id in MAKERS:
        again = make(tmp_path, id)
        assert {path.relative_to(tmp_path): path.read_bytes() for path in again.rglob("*.*")} == {
            path.relative_to(made): path.read_bytes() for path in (made / id).rglob("*.*")
        }


def rows(made: Path, id: str, config: str | None, split: str, tmp_path: Path) -> list[dict[str, Any]]:
    return [*load(made / id, config, split, tmp_path)]


def test_odd_rows_of_openr1(made: Path, tmp_path: Path) -> None:
    of = {row["uuid"]: row for row in rows(made, mathematics.OPENR1, "default", "train", tmp_path)}
    of |= {row["uuid"]: row for row in rows(made, mathematics.OPENR1, "extended", "train", tmp_path)}
    assert mathematics.OPENR1_ODD.keys() < of.keys()
    by_number = {number: of[mathematics.uuid_of(number)] for number in (0, 1, 2, *range(28, 40), 120)}
    assert [by_number[number]["answer"] for number in (28, 29, 30, 38)] == ["proof", "notfound", "\\text{}", "B"]
    assert by_number[31]["correctness_math_verify"] is by_number[31]["correctness_llama"] is None
    assert by_number[32]["correctness_math_verify"] == [True, None]
    assert by_number[34]["finish_reasons"] == ["length", "stop"] and by_number[35]["finish_reasons"] is None
    assert by_number[36]["generations"] == []
    assert by_number[37]["problem"] == by_number[0]["problem"] and by_number[120]["problem"] == by_number[2]["problem"]
    assert by_number[39]["problem"].split() != by_number[1]["problem"].split()
    for uuid, row in of.items():
        if uuid not in mathematics.OPENR1_ODD:  # the flags are true
            boxed = [f"\\boxed{{{row['answer']}}}" in generation for generation in row["generations"]]
            assert boxed == row["correctness_math_verify"] and row["source"] in mathematics.SOURCES


def test_odd_rows_of_codeforces(made: Path, tmp_path: Path) -> None:
    of = {row["id"]: row for row in rows(made, programs.CODEFORCES, None, "train", tmp_path)}
    assert programs.CODEFORCES_ODD.keys() < of.keys()
    assert of["901/A"]["official_tests"][0]["input"].endswith("\r\n")
    assert of["904/D"]["interaction_format"] and of["905/A"]["input_mode"] == "file"
    assert of["907/A"]["aliases"] == ["908/C"] and of["908/C"]["aliases"] == ["907/A"]
    assert of["911/A"]["official_tests"] is None and of["914/A"]["examples"] is None
    assert of["914/A"]["memory_limit"] == 62.5 and "$$$a$$$" in of["912/F"]["description"]
    verifiable = {row["id"] for row in rows(made, programs.CODEFORCES, "verifiable", "train", tmp_path)}
    assert of.keys() - verifiable == {"903/C", "904/D", "911/A", "913/A"}
    prompts = rows(made, programs.CODEFORCES, "verifiable-prompts", "train", tmp_path)
    assert {row["id"] for row in prompts if row["language"] == "cpp"} == verifiable
    assert {row["id"] for row in prompts if row["language"] == "python"} == verifiable
    for id, row in of.items():
        if row["generated_tests"]:
            name = f"generated_tests/test_cases_{int(row['contest_id']):04d}.parquet"
            options = {"data_files": {"tests": name}}
            kept = [test for test in load(made / programs.CODEFORCES, None, "tests", tmp_path, **options)]
            assert sum(test["problem_id"] == id for test in kept) == row["generated_tests"] < len(kept)
            assert kept[0].keys() == {"problem_id", "input", "output", "test_case_i"}


def ran(*arguments: str | Path, given: str = "") -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_programs_solve_the_plain_problems_and_the_checker_tells_right_from_wrong(made: Path, tmp_path: Path) -> None:
    for number in range(4):
        test = programs.problem(number)["official_tests"][2]
        assert ran("-c", programs.program(number, "python"), given=test["input"]) == test["output"]
    for name, text in (("checker.py", programs.CHECKER), ("in", "10\n"), ("right", "4 6\n"), ("wrong", "4 5\n")):
        (tmp_path / name).write_text(text)
    answers = [
        ran(tmp_path / "checker.py", tmp_path / "in", tmp_path / "right", tmp_path / out) for out in ("right", "wrong")
    ]
    assert answers == ["1\n", "0\n"]


def test_odd_rows_of_traces(made: Path, tmp_path: Path) -> None:
    known = {row["id"] for row in rows(made, programs.CODEFORCES, None, "train", tmp_path)}
    for config, odd in programs.TRACES_ODD.items():
        traces = rows(made, programs.TRACES, config, "train", tmp_path)
        assert odd.keys() < {*range(len(traces))}
        language = "cpp" if config == "solutions" else "python"
        for place, row in enumerate(traces):
            number = place // 5 if language == "cpp" else place
            if place not in odd:
                assert row["id"] == f"{800 + number}/A" and row["finish_reason"] == "stop"
                assert row["generation"].startswith("<think>")
                assert row["generation"].endswith(f"</think>\n\n```{language}\n{programs.program(number, language)}```")
            assert (row["finish_reason"] == "length") == odd.get(place, "").startswith("cut")
            assert (row["id"] in known) == ("not in" not in odd.get(place, ""))


def test_countdown_can_be_reached_and_repeats(made: Path, tmp_path: Path) -> None:
    data = rows(made, mathematics.COUNTDOWN, None, "train", tmp_path)
    assert {*mathematics.COUNTDOWN_ODD} == {36, 37, 38, 39}
    for row in data[:36]:
        *scale, a, b, c = row["nums"]
        assert (scale[0] if scale else 1) * a + b - c == row["target"]
    keys = [(row["target"], tuple(sorted(row["nums"]))) for row in data]
    assert keys[36:39] == keys[:3] and len({*keys[:36]}) == 36
    assert data[36] != data[0] and data[38] == data[2]


def test_odd_rows_of_the_other_mathematics(made: Path, tmp_path: Path) -> None:
    aime = [row["solution"] for row in rows(made, mathematics.AIME24, None, "test", tmp_path)]
    assert aime[3:5] == ["\\boxed{8}", "9"] and "\\boxed{032}" in aime[27] and aime[28].count("boxed") == 2
    assert not any(sign.isdigit() for sign in aime[29])
    amo = rows(made, mathematics.AMO, None, "test", tmp_path)
    assert {row["answer_type"] for row in amo} == {*mathematics.AMO_TYPES, "description"}
    described = {row["question_id"] for row in amo if row["answer_type"] == "description"}
    assert described == {id for id, odd in mathematics.AMO_ODD.items() if odd == "description"}
    assert mathematics.MATH500_ODD.keys() < {
        row["unique_id"] for row in rows(made, mathematics.MATH500, None, "test", tmp_path)
    }
    hmmt = rows(made, mathematics.HMMT, None, "train", tmp_path)
    assert [hmmt[27]["answer"], hmmt[28]["answer"], len(hmmt[29]["problem_type"])] == ["1, 2", "[0, 3)", 2]


def test_livecodebench_is_refused_for_its_script_and_read_file_by_file(made: Path, tmp_path: Path) -> None:
    folder = made / livecodebench.LIVECODEBENCH
    with pytest.raises(RuntimeError, match="Dataset scripts are no longer supported"):
        load(folder, None, "test", tmp_path)
    files = [folder / name for name in livecodebench.FILES]
    data = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    texts = dict.fromkeys(LIVECODEBENCH, str)
    assert all({name: type(value) for name, value in row.items()} == texts for row in data)
    guessed = load(Path("json"), None, "train", tmp_path, data_files=[*map(str, files)])
    assert said(guessed.features["contest_date"]) == "timestamp[s]"  # so these files are not for `datasets` to read
    assert [row["question_id"] for row in data] == [f"made_up_{number}" for number in range(36)]
    assert livecodebench.LIVECODEBENCH_ODD.keys() < {row["question_id"] for row in data}
    json.loads(data[0]["private_test_cases"])
    for row in data[1:]:
        private = json.loads(pickle.loads(zlib.decompress(base64.b64decode(row["private_test_cases"]))))
        public, name = json.loads(row["public_test_cases"]), json.loads(row["metadata"]).get("func_name")
        assert {test["testtype"] for test in public + private} == {"functional" if name else "stdin"}
        assert bool(row["starter_code"]) == bool(name) and len(private) == (
            0 if row["question_id"] == "made_up_2" else 2
        )
    copied = load(made / livecodebench.LIVECODEBENCH_PARQUET, "release_latest", "test", tmp_path)
    assert [*copied] == data


def test_odd_rows_of_instructions_and_choices(made: Path, tmp_path: Path) -> None:
    for id, odd in ((benchmarks.IFEVAL, benchmarks.IFEVAL_ODD), (benchmarks.IFBENCH, benchmarks.IFBENCH_ODD)):
        of = {row["key"]: row for row in rows(made, id, None, "train", tmp_path)}
        two, unknown = (of[key]["instruction_id_list"] for key in odd)
        assert len(two) == 2 and unknown == ["made_up:unknown"]
        assert all(len(row["kwargs"]) == len(row["instruction_id_list"]) for row in of.values())
    mmlu = rows(made, benchmarks.MMLU, "all", "test", tmp_path)
    for place, row in enumerate(mmlu):
        assert row["answer"] == place % 4
        assert row["choices"][row["answer"]] == str(place + 1) or place in benchmarks.MMLU_ODD
    for place, row in enumerate(rows(made, benchmarks.MMLU_PRO, None, "test", tmp_path)):
        assert "ABCDEFGHIJ".index(row["answer"]) == row["answer_index"]
        right = row["options"][row["answer_index"]]
        assert right == ("N/A" if row["question_id"] == 129 else str(place + 1))
        assert (len(row["options"]) < 10 or "N/A" in row["options"]) == (row["question_id"] in benchmarks.MMLU_PRO_ODD)


def test_a_renamed_column(tmp_path: Path) -> None:
    folder = make(tmp_path, mathematics.HMMT)
    rename_column(folder, "answer", "gold")
    assert "gold" in load(folder, None, "train", tmp_path / "cache").column_names
    with pytest.raises(ValueError, match="has a column 'answer'"):
        rename_column(folder, "answer", "gold")
