"""Throughput of math grading: by two workers, and by math-verify alone in this process.

    python benchmarks/math_grader.py

Prints a table and writes benchmarks/results/math_grader.json. The baseline calls math-verify unguarded in one process;
it gets no hostile answers, which would hang it; 2% of them, 12 of 600, cost two workers 18 s of deadlines. `all`
grades as a task does, numbers and words without algebra; `algebra` sends every answer to a worker.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdzero.graders import math as math_grader
from sdzero.graders.worker_pool import Failed, GraderPool

NUM_WORKERS, DEADLINE, REPEATS = 2, 3.0, 5
RESULTS = Path(__file__).parent / "results/math_grader.json"
HOSTILE = (  # not rejected by `decide`: their workers must be killed
    ("9^{9^{9^9}}", "5"),
    ("(a+b+c+d+e+f)^{40}", "(a+b+c+d+e+g)^{40}"),
    (r"\prod_{k=1}^{10^9} k", "5"),
)
Pair = tuple[str, str]


def ordinary(num: int, seed: int = 0) -> list[Pair]:
    """Generate answers like those of competitions: seven in ten are numbers, a quarter are wrong."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for _ in range(num):
        a, b, c = rng.randint(2, 9), rng.randint(2, 99), rng.randint(2, 99)
        forms = [(str(b * c), str(b * c))] * 5 + [(rf"\frac{{{b}}}{{{c}}}", f"{b}/{c}")] * 2
        forms += [
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}"),
            (rf"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})"),
            (f"({a},{b})", f"({a}, {b})"),
        ]
        answer, gold = rng.choice(forms)
        pairs.append((answer if rng.random() < 0.75 else answer.replace(str(b), str(b + 1)), gold))
    return pairs


def with_hostile(pairs: list[Pair], share: float = 0.02) -> list[Pair]:
    step = round(1 / share)
    return [HOSTILE[i // step % len(HOSTILE)] if i % step == 0 else pair for i, pair in enumerate(pairs)]


def bare(pairs: list[Pair]) -> list[Any]:
    from math_verify import parse, verify

    none: Any = None
    return [
        verify(
            parse(f"${gold}$", parsing_timeout=none), parse(f"${answer}$", parsing_timeout=none), timeout_seconds=none
        )
        for answer, gold in pairs
    ]


def quick_first(pool: GraderPool[math_grader.Item, Any], pairs: list[Pair]) -> list[Any]:
    open_ = [pair for pair in pairs if math_grader.decide(*pair) is None]
    return pool.map(open_)


def measured(run: Callable[[list[Pair]], list[Any]], make: Callable[[int], list[Pair]]) -> dict[str, Any]:
    """Measure answers per second over batches of different answers, since sympy caches results."""
    rates, failed = [], 0
    for seed in range(REPEATS):
        pairs = make(seed + 1)
        began = time.perf_counter()
        outcomes = run(pairs)
        rates.append(len(pairs) / (time.perf_counter() - began))
        failed += sum(isinstance(outcome, Failed) for outcome in outcomes)
    return {
        "answers_per_second": round(statistics.median(rates), 1),
        "least": round(min(rates), 1),
        "most": round(max(rates), 1),
        "answers": len(pairs),
        "failed": failed,
    }


def main() -> None:
    pool: GraderPool[math_grader.Item, Any] = GraderPool(math_grader.work, math_grader.WARM_UP, NUM_WORKERS, DEADLINE)
    bare(ordinary(20))
    quick_first(pool, ordinary(50))  # the workers are up
    rows = {
        "math-verify alone, 1 process, ordinary": measured(bare, lambda seed: ordinary(300, seed)),
        "algebra, 2 workers, ordinary": measured(lambda pairs: pool.map(pairs), lambda seed: ordinary(600, seed)),
        "algebra, 2 workers, 2% hostile": measured(
            lambda pairs: pool.map(pairs), lambda seed: with_hostile(ordinary(600, seed))
        ),
        "all, 2 workers, ordinary": measured(lambda pairs: quick_first(pool, pairs), lambda seed: ordinary(600, seed)),
        "all, 2 workers, 2% hostile": measured(
            lambda pairs: quick_first(pool, pairs), lambda seed: with_hostile(ordinary(600, seed))
        ),
    }
    for name, row in rows.items():
        print(
            f"{name:42} {row['answers_per_second']:9.1f}/s  ({row['least']:.1f} to {row['most']:.1f}; "
            f"{row['failed']} of {REPEATS * row['answers']} failed)"
        )
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "deadline_seconds": DEADLINE}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "repeats": REPEATS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
