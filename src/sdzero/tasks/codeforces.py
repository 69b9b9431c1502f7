"""open-r1/codeforces: the paper's programming questions, each problem in C++ and in Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq

from sdzero.graders.sandbox.types import Language, StdioTest, Submission, Test
from sdzero.tasks.code import Code
from sdzero.tasks.hub import HubDataset, Row, hub_files
from sdzero.tasks.rows import SetAside
from sdzero.tasks.sources import Source
from sdzero.tasks.splits import Sizes
from sdzero.types import Question, Split

CODEFORCES = HubDataset(
    "open-r1/codeforces",
    config="verifiable",
    revision="fbe3f6e903ee854eec2e69e9d96d0306cde59baf",  # as pinned in public code; not verified
)
SIZES = Sizes(10_000, 9_000, 1_000)  # 500 held-out problems in two languages; the rest shrinks in proportion

_COLUMNS = (  # without the editorial, the tags and the contest's name
    *("id", "aliases", "contest_id", "rating", "title", "description", "input_format", "output_format"),
    *("interaction_format", "note", "examples", "time_limit", "memory_limit", "input_mode", "generated_checker"),
    *("executable", "official_tests", "official_tests_complete", "generated_tests"),
)
_NUM_CACHED = 8  # problems whose tests stay in memory


class Codeforces(Code):
    """Problems of open-r1/codeforces, one question per problem and language.

    All languages of a problem, and all problems joined by `aliases` or by the same statement, are in one split.

    Programs run against the official tests if the row has them all; else against the uncut official ones followed by
    the generated ones. The latter are one file per contest (`generated_tests/test_cases_0001.parquet`), in total more
    than memory holds, in the same repository or beside the file `path`. `questions` downloads the files of the
    requested questions' contests; a problem's tests are read when its answers are graded.

    Interactive problems and those not `executable` are set aside. Problems with neither complete official tests nor
    generated ones are dropped, as are those missing from their contest's file.

    Args:
        path: source, or one per split; only the needed columns are read. To evaluate on the held-out questions, use the
            path, languages and sizes of the training.
        languages: languages to ask each problem in, `cpp` and `python`.
        sizes: number of questions per split; null splits by the hash of the problem.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source] = CODEFORCES,
        languages: tuple[Language, ...] = ("cpp", "python"),
        sizes: Sizes | None = SIZES,
        **kwargs: Any,
    ) -> None:
        known = get_args(Language)
        if not languages or not {*languages} <= {*known} or len({*languages}) < len(languages):
            raise ValueError(f"task.languages must name one or more of {[*known]}, each once, got {[*languages]}")
        super().__init__(
            path,
            "tests",
            language="cpp",
            compare="tokens",
            allow_assertions=False,
            question_column="statement",
            id_column="id",
            sizes=sizes,
            **kwargs,
        )
        self.languages = tuple(languages)
        self._parents: dict[str, str] = {}  # problem -> one of its family with a smaller id
        self._first: dict[str, str] = {}  # statement -> the first problem that has it
        # problem -> usable tests of its row; if they are not all, the repository file of the generated ones
        self._tests: dict[str, tuple[Sequence[Mapping[str, Any]], str | None]] = {}
        self._files: dict[str, tuple[Path, set[str]]] = {}  # name -> local path, the problems in it
        self._cached_tests = lru_cache(_NUM_CACHED)(self._read_tests)

    def required_columns(self) -> dict[str, str]:
        return {}

    def load_rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        if isinstance(source, HubDataset) and source.columns is None:
            source = replace(source, columns=())
        return super().load_rows(source, _COLUMNS)

    def convert_row(self, row: Row) -> Sequence[Row]:
        """Return one row per language, reduced to what grading and analysis need."""
        problem = row.get("id")
        if not problem:
            raise ValueError("column 'id' is empty")
        self._join(problem, *(row.get("aliases") or ()))
        [row] = super().convert_row(row)
        if not row.get("executable"):
            raise SetAside("its programs cannot be executed (executable)")
        statement = format_statement(row)
        self._join(problem, self._first.setdefault(statement, problem))
        common = {"problem": problem, "statement": statement, "tests": _tests(row)}
        for column in ("contest_id", "rating", "time_limit", "memory_limit", "input_mode", "generated_checker"):
            common[column] = row.get(column)
        return [{**common, "id": f"{problem}/{language}", "language": language} for language in self.languages]

    def dedup_key(self, question: Question) -> str:
        return f"{question.meta['language']}\n{question.text}"

    def families(self, questions: Sequence[Question]) -> dict[str, str]:
        return {question.id: f"codeforces/{self._root(question.meta['problem'])}" for question in questions}

    def _join(self, *problems: str) -> None:
        first, *others = sorted({self._root(problem) for problem in problems})
        self._parents |= dict.fromkeys(others, first)

    def _root(self, problem: str) -> str:
        while problem in self._parents:
            problem = self._parents[problem]
        return problem

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        """Return the questions, downloading the files of generated tests they need."""
        while True:
            questions = self.ungraded_questions(split, num_questions)
            files = {q.meta["problem"]: file for q in questions if (file := self._tests[q.meta["problem"]][1])}
            self._download(files.values())
            missing = {problem for problem, file in files.items() if problem not in self._files[file][1]}
            lacking = {q.id for q in questions if q.meta["problem"] in missing}
            if not lacking:
                return questions
            fault = "the file of its contest has no generated tests of it"
            dropped = [(self._locations[id], fault) for id in sorted(lacking)]
            self._drop(dropped, len(questions), f"questions of split {split!r}")
            self._all = [(of, question) for of, question in self._all if question.id not in lacking]

    def ungraded_questions(self, split: Split, num_questions: int | None) -> list[Question]:
        return super().questions(split, num_questions)

    def tests(self, question: Question) -> tuple[Test, ...]:
        return self._cached_tests(question.meta["problem"])

    def _submission(self, question: Question, row: Mapping[str, Any]) -> Submission:
        self._tests[row["problem"]] = row["tests"]
        return self._template(row)

    def _download(self, files: Iterable[str]) -> None:
        """Download files of tests. Raises: FileNotFoundError if one does not exist or the Hub is unreachable."""
        new = [file for file in dict.fromkeys(files) if file not in self._files]
        if not new:
            return
        source = next(iter(self.path.values())) if isinstance(self.path, Mapping) else self.path
        repository = source if isinstance(source, HubDataset) else HubDataset(str(Path(source).parent))
        for file, path in zip(new, hub_files(repository, new), strict=True):
            problems = pq.read_table(path, columns=["problem_id"])["problem_id"].unique().to_pylist()
            self._files[file] = path, {*problems}

    def _read_tests(self, problem: str) -> tuple[Test, ...]:
        """Read a problem's tests. Raises: ValueError if none is usable, since no program could be graded."""
        official, file = self._tests[problem]
        rows = [*official]
        if file is not None:
            self._download([file])
            table = pq.read_table(
                self._files[file][0], columns=["input", "output"], filters=[("problem_id", "=", problem)]
            )
            rows += [row for row in table.to_pylist() if _is_complete(row)]
        if not rows:
            raise ValueError(f"{file} of {self.name} has no tests of problem {problem}")
        return tuple(StdioTest(_lines(row["input"]), _lines(row["output"])) for row in rows)


def format_statement(row: Row) -> str:
    """Build a problem's statement; `$$$` around formulas becomes `$`. Raises: ValueError if it has no description."""
    texts = ("title", "description", "input_format", "output_format", "note")
    cells = {column: _lines(str(row.get(column) or "")).replace("$$$", "$").strip() for column in texts}
    if not cells["description"]:
        raise ValueError("column 'description' is empty")
    parts = [f"# {cells['title']}", cells["description"]]
    for heading, column in (("Input", "input_format"), ("Output", "output_format")):
        if cells[column]:
            parts.append(f"## {heading}\n\n{cells[column]}")
    for number, example in enumerate(row.get("examples") or (), 1):
        stdin, stdout = _lines(example["input"]).strip("\n"), _lines(example["output"]).strip("\n")
        parts.append(f"## Example {number}\n\nInput:\n```\n{stdin}\n```\nOutput:\n```\n{stdout}\n```")
    if cells["note"]:
        parts.append(f"## Note\n\n{cells['note']}")
    return "\n\n".join(parts)


def _tests(row: Row) -> tuple[Sequence[Mapping[str, Any]], str | None]:
    """Return the usable tests of a row and, if they are not all, the repository file of the generated ones.

    Raises: ValueError if the row says that there are none.
    """
    official = row.get("official_tests") or []
    if row.get("official_tests_complete") and official:
        if incomplete := [number for number, test in enumerate(official, 1) if not _is_complete(test)]:
            raise ValueError(f"test {incomplete[0]} of official_tests lacks its input or its output")
        return official, None
    if not row.get("generated_tests"):
        raise ValueError("its official_tests are incomplete (official_tests_complete), and it has no generated_tests")
    if not str(row.get("contest_id")).isdecimal():
        raise ValueError(f"contest_id is {row.get('contest_id')!r}: it must be a number, to find its tests")
    uncut = [
        test for test in official if _is_complete(test) and not (_is_cut(test["input"]) or _is_cut(test["output"]))
    ]
    return uncut, f"generated_tests/test_cases_{int(row['contest_id']):04d}.parquet"


def _is_complete(test: Mapping[str, Any]) -> bool:
    return isinstance(test.get("input"), str) and isinstance(test.get("output"), str)


def _is_cut(text: str) -> bool:
    return text.rstrip().endswith("...")  # the site shows only a part


def _lines(text: str) -> str:
    """Convert line ends to those a program reads on the site: without `\\r`."""
    return text.replace("\r\n", "\n")
