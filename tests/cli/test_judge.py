"""`sdzero judge` on the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sandbox

ENVIRONMENT = {**os.environ, "COLUMNS": "100"}


def judge(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-X", "importtime", "-m", "sdzero", "judge", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, env=ENVIRONMENT)


def test_a_program_against_its_tests(tmp_path: Path) -> None:
    (tmp_path / "add.py").write_text("print(sum(map(int, input().split())))")
    (tmp_path / "tests.json").write_text('[{"input": "1 2", "output": "3"}, {"input": "1", "output": "2"}]')
    done = judge(tmp_path / "add.py", "--language", "python", "--tests", tmp_path / "tests.json", "--memory-limit", 64)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["reward"], verdict["reason"]) == (0, "wrong")
    assert [test["reason"] for test in verdict["tests"]] == ["correct", "wrong"]
    assert {*verdict["tests"][0]} == {"reason", "cpu_seconds", "wall_seconds", "memory_mb", "stdout", "stderr"}
    assert verdict["tests"][1]["stdout"] == "1\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "json" in imported and not imported & {"torch", "numpy", "transformers", "lightning"}


def test_calls_and_the_time_limit(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def f(x):\n    while x: pass\n    return [x]")
    tests = [{"call": "f", "args": [x], "expected": [x]} for x in (0, 1)]
    (tmp_path / "tests.json").write_text(json.dumps(tests))
    done = judge(tmp_path / "f.py", "--language", "python", "--tests", tmp_path / "tests.json", "--time-limit", 1)
    verdict = json.loads(done.stdout)
    assert [test["reason"] for test in verdict["tests"]] == ["correct", "timeout"]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("[]", "it has no tests"),
        ("{", "not valid JSON"),
        ('[{"input": "1"}]', "test 1: a test is"),
        ('[{"input": "1", "output": "1"}, {"call": "f", "args": [], "expected": 1}]', "needs tests of one kind"),
    ],
)
def test_invalid_tests_are_named(tmp_path: Path, tests: str, message: str) -> None:
    (tmp_path / "p.py").write_text("")
    (tmp_path / "tests.json").write_text(tests)
    done = judge(tmp_path / "p.py", "--language", "python", "--tests", tmp_path / "tests.json")
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
