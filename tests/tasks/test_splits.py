from __future__ import annotations

from collections import Counter

import pytest

from sdzero.tasks import splits
from sdzero.tasks.splits import split_of, take
from sdzero.types import Question


def stream(names: list[str]):
    return ((name, Question(name, name, "")) for name in names)


def test_shares_of_the_splits() -> None:
    counts = Counter(split_of(f"question {i}") for i in range(5000))
    assert counts["eval"] == pytest.approx(1000, abs=100)
    assert counts["phase1"] == pytest.approx(2000, abs=130)
    assert counts["phase2"] == pytest.approx(2000, abs=130)


def test_duplicates_are_dropped_and_order_is_kept() -> None:
    names = [name for name in map(str, range(100)) if split_of(name) == "phase1"][:4]
    doubled = [names[0], names[1], names[0], names[2], names[1], names[3]]
    assert [question.id for question in take("phase1", 4, stream(doubled), "t")] == names


def test_a_finite_stream_that_is_too_small_says_how_many_there_are() -> None:
    names = list(map(str, range(50)))
    there = sum(split_of(name) == "eval" for name in names)
    with pytest.raises(ValueError, match=rf"num_questions=51.*'eval'.*'small'.*only {there}"):
        take("eval", 51, stream(names), "small")


def test_an_endless_stream_that_repeats_itself_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "_PATIENCE", 50)

    def endless():
        while True:
            yield from stream(list(map(str, range(20))))

    there = sum(split_of(str(i)) == "phase2" for i in range(20))
    with pytest.raises(ValueError, match=f"only {there}"):
        take("phase2", 21, endless(), "endless")
