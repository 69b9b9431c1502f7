"""Verdicts on the answers of math_answers.jsonl; each group gives the reason for its verdicts."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdzero.graders import math as math_grader
from sdzero.graders.sandbox.resources import process_tree
from sdzero.graders.worker_pool import Failed, GraderPool
from sdzero.types import Verdict
from support.sandboxes import command_line

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parent / "math_answers.jsonl").read_text().splitlines()
]
DEADLINE = 1.0


def graded(pool: GraderPool[math_grader.Item, Any], pairs: list[tuple[str, str]]) -> list[str]:
    """Reasons as a task reports them."""
    verdicts: list[Any] = [math_grader.decide(*pair) for pair in pairs]
    open_ = [number for number, verdict in enumerate(verdicts) if verdict is None]
    for number, outcome in zip(open_, pool.map([pairs[number] for number in open_]), strict=True):
        assert isinstance(outcome, Verdict | Failed)
        verdicts[number] = outcome
    return [verdict.reason for verdict in verdicts]


@pytest.fixture(scope="module")
def pool() -> Any:
    pool = GraderPool(math_grader.work, math_grader.WARM_UP, 2, DEADLINE)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def reasons(pool: GraderPool[math_grader.Item, Any]) -> list[str]:
    """Reasons of all rows, graded in one batch within a bounded time."""
    began = time.monotonic()
    found = graded(pool, [(row["answer"], row["gold"]) for row in ROWS])
    assert time.monotonic() - began < 60 + len(ROWS) * DEADLINE
    return found


@pytest.mark.parametrize("group", sorted({row["group"] for row in ROWS}))
def test_verdicts(reasons: list[str], group: str) -> None:
    for row, reason in zip(ROWS, reasons, strict=True):
        if row["group"] == group:
            expected = row["expected"] == reason or (row["expected"] == "no reward" and reason != "correct")
            assert expected, (row["answer"][:80], row["gold"], row["expected"], reason)


def test_the_table_is_large_and_has_every_verdict(reasons: list[str]) -> None:
    assert len(ROWS) >= 150 and {"correct", "wrong", "unparseable", "timeout"} <= {*reasons}


def test_hostile_answers_do_not_change_the_verdicts_beside_them(reasons: list[str]) -> None:
    """Shuffled, and graded by one worker instead of two."""
    numbers = [n for n, row in enumerate(ROWS) if row["group"] in ("sets", "calculus", "percent")]
    numbers += [n for n, reason in enumerate(reasons) if reason in ("timeout", "memory")][:2]
    random.Random(0).shuffle(numbers)
    pairs = [(ROWS[n]["answer"], ROWS[n]["gold"]) for n in numbers]
    alone = GraderPool(math_grader.work, math_grader.WARM_UP, 1, DEADLINE)
    assert graded(alone, pairs) == [reasons[n] for n in numbers]
    alone.close()


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_verdict_depends_neither_on_order_nor_on_neighbours(
    pool: Any, reasons: list[str], data: st.DataObject
) -> None:
    usual = [n for n, reason in enumerate(reasons) if reason in ("correct", "wrong", "unparseable")]
    usual = [n for n in usual if ROWS[n]["group"] != "hostile"]
    numbers = data.draw(st.lists(st.sampled_from(usual), min_size=2, max_size=12))
    assert graded(pool, [(ROWS[n]["answer"], ROWS[n]["gold"]) for n in numbers]) == [reasons[n] for n in numbers]


def test_killed_workers_change_no_verdict(pool: Any, reasons: list[str]) -> None:
    """SIGKILL at random times: while a worker grades, starts, reads its item or waits for one."""
    numbers = [n for n, row in enumerate(ROWS) if row["group"] in ("sets", "expression", "units", "equation")]
    pairs, expected = [(ROWS[n]["answer"], ROWS[n]["gold"]) for n in numbers], [reasons[n] for n in numbers]
    rng = random.Random(0)
    killed: list[int] = []

    def kill() -> None:
        workers = [pid for pid in process_tree(os.getpid()) if b"worker_pool import" in command_line(pid)]
        killed.append(rng.choice(workers))
        os.kill(killed[-1], signal.SIGKILL)

    for _ in range(4):
        timer = threading.Timer(rng.uniform(0, 0.4), kill)
        timer.start()
        assert graded(pool, pairs) == expected
        timer.join()
    assert len(killed) == 4


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("5", None),
        (r"\frac{\sqrt{3}}{2}", None),
        ("(1,2)", None),
        (r"\text{yes}", None),
        ("x+1", None),
        ("[1,2)", None),
        ("", "empty"),
        ("proof", "proof"),
        ("notfound", "notfound"),
        ("9^{9^{9^{9^9}}}", "too large a number"),
        ("100 (i.e., all values)", "cannot parse"),
        ("9" * 1001, "more than 1000"),
        (r"\frac{0}{0}", "unequal to itself"),
    ],
)
def test_gold_answers_that_cannot_be_graded_are_found(gold: str, reason: str | None) -> None:
    quick, slow = math_grader.check_quickly(gold), math_grader.check(gold)
    assert slow is None if reason is None else reason in (slow or "")
    assert quick is None or (quick or None) == slow


def test_the_quick_comparison_agrees_with_the_slow_one() -> None:
    """The quick comparison of numbers agrees with math-verify wherever it decides."""
    numbers = ["5", "-5", "0.5", "1/2", r"\frac{1}{2}", r"-\frac12", "1,000", "1000", "0", "-0", "2/1", "1000.0", "007"]
    for answer in numbers:
        for gold in numbers:
            quick = math_grader.decide(answer, gold)
            if quick is not None:
                assert quick == math_grader.compare((answer, gold)), (answer, gold)


@pytest.mark.parametrize("gold", ["Made up: see the picture.", "The limit exists and is equal to 3"])
def test_a_sentence_is_not_a_gold_answer(gold: str) -> None:
    """math-verify would parse it as a product of its letters."""
    assert math_grader.check_quickly(gold) == "it is a sentence"


@pytest.mark.parametrize(
    "gold", [r"\sin x \cos y \tan z", r"\text{all lines through 3}", r"n \text{ is odd and } k", "f(x)=abc, def, ghi"]
)
def test_formulas_with_words_are_not_sentences(gold: str) -> None:
    assert math_grader.check_quickly(gold) is None
