"""Throughput of the code sandbox on trivial programs, compared with bare subprocesses.

    python benchmarks/code_judge.py [--backend bubblewrap] [--runs 200] [--rounds 5]

Sandbox and bare rounds alternate; values are medians over rounds. Writes results/code_judge.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdzero.graders.sandbox.client import SandboxClient
from sdzero.graders.sandbox.types import Language, StdioTest, Submission

PROGRAMS: dict[Language, str] = {
    "python": "a, b = map(int, input().split())\nprint(a + b)\n",
    "cpp": '#include <cstdio>\nint main() { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); }\n',
}
TEST = StdioTest("1 2", "3")
IN_FLIGHT = (1, 2, 4, 8)


def bare(argv: list[str], num_runs: int, in_flight: int) -> float:
    """Measure bare subprocesses per second, `in_flight` at a time."""

    def one(_: int) -> None:
        done = subprocess.run(argv, input=b"1 2", capture_output=True, check=True)
        assert done.stdout == b"3\n"

    started = time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        list(pool.map(one, range(num_runs)))
    return num_runs / (time.perf_counter() - started)


def judged(client: SandboxClient, language: Language, num_runs: int) -> float:
    """Measure sandboxed runs per second; compiled programs are cached."""
    submissions = [Submission(language, PROGRAMS[language], (TEST,))] * num_runs
    started = time.perf_counter()
    assert all(verdict.reward == 1 for verdict in client.grade(submissions))
    return num_runs / (time.perf_counter() - started)


def _line(row: dict[str, Any]) -> str:
    rates = f"{row['judge']:5.0f}/s judged, {row['bare']:5.0f}/s bare, ratio {row['ratio']:.2f}"
    return f"{row['language']:7} {row['in_flight']} at a time: {rates}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "main.py").write_text(PROGRAMS["python"])
        (Path(folder) / "main.cpp").write_text(PROGRAMS["cpp"])
        subprocess.run(["g++", "-O2", "-o", f"{folder}/main", f"{folder}/main.cpp"], check=True)
        commands: dict[Language, list[str]] = {
            "python": ["/usr/bin/python3", "-I", "-B", f"{folder}/main.py"],
            "cpp": [f"{folder}/main"],
        }
        for in_flight in IN_FLIGHT:
            with SandboxClient(given.backend, in_flight) as client:
                for language, argv in commands.items():
                    judged(client, language, 8)  # compiled, and both warm
                    sides: dict[str, Callable[[], float]] = {
                        "bare": lambda argv=argv, n=in_flight: bare(argv, given.runs, n),
                        "judge": lambda language=language, client=client: judged(client, language, given.runs),
                    }
                    rates = {name: [] for name in sides}
                    for _ in range(given.rounds):
                        for name, side in sides.items():
                            rates[name].append(side())
                    row = {name: statistics.median(values) for name, values in rates.items()}
                    row = {"language": language, "in_flight": in_flight, "backend": client.backend, **row}
                    rows.append({**row, "ratio": row["judge"] / row["bare"]})
                    print(_line(rows[-1]), flush=True)
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "rounds": given.rounds,
        "rows": rows,
    }
    Path(__file__).with_name("results").mkdir(exist_ok=True)
    (Path(__file__).with_name("results") / "code_judge.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
