"""`sdzero judge`: run one program against its tests in the sandbox and print the verdict as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import get_args

from sdzero.graders.sandbox.backends import BACKENDS
from sdzero.graders.sandbox.client import SandboxClient
from sdzero.graders.sandbox.types import Language, Limits, Submission, parse_tests


def main(arguments: list[str]) -> None:
    defaults = Limits()
    parser = argparse.ArgumentParser(prog="sdzero judge", description=__doc__)
    parser.add_argument("program", type=Path, help="file with the program")
    parser.add_argument("--language", required=True, choices=get_args(Language))
    parser.add_argument(
        "--tests",
        required=True,
        type=Path,
        help='JSON list of {"input", "output"}, {"call", "args", "expected"} or {"program"}',
    )
    parser.add_argument("--time-limit", type=float, default=defaults.time, metavar="S", help="CPU seconds per test")
    parser.add_argument("--memory-limit", type=float, default=defaults.memory_mb, metavar="MB", help="MiB per test")
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS], help="sandbox; unsafe: none")
    parser.add_argument("--python", help="interpreter in the sandbox, below /usr; default: the system's python3")
    given = parser.parse_args(arguments)
    try:
        tests = parse_tests(given.tests.read_text())
    except ValueError as error:
        raise ValueError(f"{given.tests}: {error}") from None
    limits = Limits(time=given.time_limit, memory_mb=given.memory_limit)
    source = given.program.read_text(errors="surrogateescape")
    submission = Submission(given.language, source, tests, limits)
    with SandboxClient(given.backend, 1, given.python) as client:
        verdict = client.grade([submission])[0]
    text = json.dumps(dataclasses.asdict(verdict))
    print(json.dumps(json.loads(text, parse_float=lambda digits: round(float(digits), 3)), indent=2))
