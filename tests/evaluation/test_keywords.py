"""Keywords are found as whole words, in any case and with any apostrophe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.evaluation.keywords import KEYWORDS, count_keywords


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wait, this response is not correct, let me start over.", 2),
        ("Let me rephrase the above solution.", 0),
        ("await the waiter, incorrectly", 0),
        ("WAIT! wait. (wait)", 3),
        ("Wait a minute.", 1),
        ("Let’s recheck; let's recheck; LET‘S RECHECK", 3),
        ("Let's re-evaluate this", 1),
        ("we re-evaluate this", 1),
        ("hold on second thought", 1),  # the longer "on second thought" overlaps "hold on"
        ("let me\n double check", 1),
        ("that’s wrong: incorrect. Oops, I made a mistake, my mistake", 5),
        ("wait2 wait_ _wait", 0),
        ("", 0),
    ],
)
def test_keywords(text: str, expected: int) -> None:
    assert count_keywords(text) == expected


def test_every_keyword_counts_once_alone() -> None:
    assert len(KEYWORDS) == 27
    for keyword in KEYWORDS:
        assert count_keywords(keyword) == 1, keyword
        assert count_keywords(keyword.upper().replace("'", "’")) == 1
        assert count_keywords(f"x{keyword}") == 0 or " " in keyword or "-" in keyword


@given(st.lists(st.sampled_from(KEYWORDS), max_size=6))
def test_separated_keywords_add_up(keywords: list[str]) -> None:
    assert count_keywords(" ... ".join(keywords)) == len(keywords)
