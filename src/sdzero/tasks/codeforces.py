"""open-r1/codeforces: the paper's questions of programming, each problem in C++ and in Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq

from sdzero.graders.sandbox.types import Language, Limits, StdioTest, Submission, Test
from sdzero.tasks.code import LIMITS, Code
from sdzero.tasks.files import Row
from sdzero.tasks.hub import HubDataset, hub_files
from sdzero.tasks.rows import SetAside, Source
from sdzero.tasks.splits import Sizes
from sdzero.types import Question, Split

CODEFORCES = HubDataset(
    "open-r1/codeforces",
    config="verifiable",
    revision="fbe3f6e903ee854eec2e69e9d96d0306cde59baf",  # seen in public code; not checked from here
)
SIZES = Sizes(10_000, 9_000, 1_000)  # 500 held-out problems in two languages; the rest shrinks in proportion

_COLUMNS = (  # the editorial, the tags and the contest's name are not read
    *("id", "aliases", "contest_id", "rating", "title", "description", "input_format", "output_format"),
    *("interaction_format", "note", "examples", "time_limit", "memory_limit", "input_mode", "generated_checker"),
    *("executable", "official_tests", "official_tests_complete", "generated_tests"),
)
_CUT = "..."  # at the end of an official test that the site shows in part
_NUM_KEPT = 8  # problems whose tests stay in memory


@dataclass(frozen=True)
class _Tests:
    """A problem's tests: those of its row that can be used and, where they are not all, a file of the repository."""

    official: Sequence[Mapping[str, Any]]
    file: str | None


class Codeforces(Code):
    """The problems of open-r1/codeforces, one question for each problem and language.

    All languages of a problem, and all problems that `aliases` or the same statement join, are in one split.

    Programs are held against the official tests where the row has them all; else against those that are not cut, and
    after them the generated ones. These are a file per contest (`generated_tests/test_cases_0001.parquet`), in all more
    than memory holds, in the same repository or beside the file that `path` names. `questions` downloads the files of
    the contests that it asks; a problem's tests are read when its answers are judged.

    Interactive problems and those that are not `executable` are set aside. Left out are problems with neither all
    official tests nor generated ones, which the rows say, and those that their contest's file does not have.

    Args:
        path: as in Rows; only the columns that are needed are read. An evaluation of the held-out questions names the
            path, the languages and the sizes of the training.
        languages: those in which each problem is asked, `cpp` and `python`.
        limits: as in Code.
        max_dropped_share: as in Rows.
        backend: as in Code.
        num_workers: as in Code.
        python: as in Code.
        sizes: as in Rows; null deals them out by the hash of the problem.

    Raises:
        sdzero.graders.errors.NoSandboxError: no sandbox holds here.
    """

    def __init__(
        self,
        path: Source | dict[Split, Source] = CODEFORCES,
        languages: tuple[Language, ...] = ("cpp", "python"),
        limits: Limits = LIMITS,
        max_dropped_share: float = 0.05,
        backend: str = "auto",
        num_workers: int | None = None,
        python: str | None = None,
        sizes: Sizes | None = SIZES,
    ) -> None:
        known = get_args(Language)
        if not languages or not {*languages} <= {*known} or len({*languages}) < len(languages):
            raise ValueError(f"task.languages must name one or more of {[*known]}, each once, got {[*languages]}")
        super().__init__(
            path,
            "statement",
            "tests",
            "id",
            max_dropped_share,
            limits=limits,
            backend=backend,
            num_workers=num_workers,
            python=python,
            sizes=sizes,
        )
        self.languages = tuple(languages)
        self._parents: dict[str, str] = {}  # problem -> one of its family with a smaller name
        self._first: dict[str, str] = {}  # statement -> the first problem that has it
        self._tests: dict[str, _Tests] = {}
        self._files: dict[str, tuple[Path, frozenset[str]]] = {}  # name -> where it lies, the problems in it
        self._kept = lru_cache(_NUM_KEPT)(self._read_tests)

    # --- rows ---------------------------------------------------------------------------------

    def columns(self) -> dict[str, str]:
        return {}

    def rows(self, source: Source, columns: Sequence[str]) -> list[Row]:
        if isinstance(source, HubDataset) and source.columns is None:
            source = replace(source, columns=())
        return super().rows(source, _COLUMNS)

    def prepare(self, row: Row) -> Sequence[Row]:
        """One row per language, with what judging and analysis need of it."""
        problem = row.get("id")
        if not problem:
            raise ValueError("column 'id' is empty")
        self._join(problem, *(row.get("aliases") or ()))
        [row] = super().prepare(row)
        if not row.get("executable"):
            raise SetAside("its programs cannot be executed (executable)")
        statement = written(row)
        self._join(problem, self._first.setdefault(statement, problem))
        common = {"problem": problem, "statement": statement, "tests": _tests(row)}
        for column in ("contest_id", "rating", "time_limit", "memory_limit", "input_mode", "generated_checker"):
            common[column] = row.get(column)
        return [{**common, "id": f"{problem}/{language}", "language": language} for language in self.languages]

    def key(self, question: Question) -> str:
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

    # --- tests --------------------------------------------------------------------------------

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        """As every task's, with the files of generated tests that the questions need."""
        while True:
            questions = self.to_read(split, num_questions)
            self._fetch(file for q in questions if (file := self._tests[q.meta["problem"]].file))
            lacking = {q.id for q in questions if not self._has_tests(q.meta["problem"])}
            if not lacking:
                return questions
            reason = "the file of its contest has no generated tests of it"
            dropped = [(self._where[id], reason) for id in sorted(lacking)]
            self._drop(dropped, len(questions), f"questions of split {split!r}")
            self._all = [(of, question) for of, question in self._all if question.id not in lacking]

    def to_read(self, split: Split, num_questions: int | None) -> list[Question]:
        """The questions alone, for whom judges no answers: no file of generated tests is downloaded."""
        return super().questions(split, num_questions)

    def tests(self, question: Question) -> tuple[Test, ...]:
        return self._kept(question.meta["problem"])

    def _submission(self, question: Question, row: Mapping[str, Any]) -> Submission:
        self._tests[row["problem"]] = row["tests"]
        return self._frame(row)

    def _has_tests(self, problem: str) -> bool:
        file = self._tests[problem].file
        return file is None or problem in self._files[file][1]

    def _fetch(self, files: Iterable[str]) -> None:
        """Raises: FileNotFoundError where one is not in the repository, or that is out of reach."""
        new = [file for file in dict.fromkeys(files) if file not in self._files]
        if not new:
            return
        source = next(iter(self.path.values())) if isinstance(self.path, Mapping) else self.path
        repository = source if isinstance(source, HubDataset) else HubDataset(str(Path(source).parent))
        for file, path in zip(new, hub_files(repository, new), strict=True):
            problems = pq.read_table(path, columns=["problem_id"])["problem_id"].unique().to_pylist()
            self._files[file] = path, frozenset(problems)

    def _read_tests(self, problem: str) -> tuple[Test, ...]:
        """Raises: ValueError where the file has none that can be used: no program may be called right or wrong."""
        tests = self._tests[problem]
        rows = [*tests.official]
        if tests.file is not None:
            self._fetch([tests.file])
            path, _ = self._files[tests.file]
            table = pq.read_table(path, columns=["input", "output"], filters=[("problem_id", "=", problem)])
            rows += [row for row in table.to_pylist() if _is_whole(row)]
        if not rows:
            raise ValueError(f"{tests.file} of {self.name} has no tests of problem {problem}")
        return tuple(StdioTest(_lines(row["input"]), _lines(row["output"])) for row in rows)


def written(row: Row) -> str:
    """A problem's statement from its parts; `$$$` around formulas becomes `$`.

    Raises:
        ValueError: it has no description.
    """
    texts = ("title", "description", "input_format", "output_format", "note")
    cells = {column: _lines(str(row.get(column) or "")).replace("$$$", "$").strip() for column in texts}
    if not cells["description"]:
        raise ValueError("column 'description' is empty")
    parts = [f"# {cells['title']}", cells["description"]]
    for heading, column in (("Input", "input_format"), ("Output", "output_format")):
        if cells[column]:
            parts.append(f"## {heading}\n\n{cells[column]}")
    for number, example in enumerate(row.get("examples") or (), 1):
        given, due = _lines(example["input"]).strip("\n"), _lines(example["output"]).strip("\n")
        parts.append(f"## Example {number}\n\nInput:\n```\n{given}\n```\nOutput:\n```\n{due}\n```")
    if cells["note"]:
        parts.append(f"## Note\n\n{cells['note']}")
    return "\n\n".join(parts)


def _tests(row: Row) -> _Tests:
    """Raises: ValueError where the row says that there are none to hold a program against."""
    official = row.get("official_tests") or []
    if row.get("official_tests_complete") and official:
        if wrong := [number for number, test in enumerate(official, 1) if not _is_whole(test)]:
            raise ValueError(f"test {wrong[0]} of official_tests lacks its input or its output")
        return _Tests(official, None)
    if not row.get("generated_tests"):
        raise ValueError(
            "its official_tests are not all there (official_tests_complete), and it has no generated_tests"
        )
    if not str(row.get("contest_id")).isdecimal():
        raise ValueError(f"contest_id is {row.get('contest_id')!r}: it must be a number, by which its tests are found")
    usable = [test for test in official if _is_whole(test) and not _is_cut(test)]
    return _Tests(usable, f"generated_tests/test_cases_{int(row['contest_id']):04d}.parquet")


def _is_whole(test: Mapping[str, Any]) -> bool:
    return isinstance(test.get("input"), str) and isinstance(test.get("output"), str)


def _is_cut(test: Mapping[str, Any]) -> bool:
    return any(test[side].rstrip().endswith(_CUT) for side in ("input", "output"))


def _lines(text: str) -> str:
    """With the ends of lines that a program reads on the site, where files are text: without `\\r`."""
    return text.replace("\r\n", "\n")
