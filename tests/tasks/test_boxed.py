from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.tasks.boxed import last_boxed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{1} and an open \boxed{2", "1"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"boxed{3}", None),
        (r"\boxed{a}{b}", "a"),
        (r"\boxed{\boxed{5}}", "5"),
    ],
)
def test_the_last_balanced_box(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def test_a_box_of_more_than_the_limit_is_not_read() -> None:
    assert last_boxed(r"\boxed{" + "1" * 1000 + "}") == "1" * 1000
    assert last_boxed(r"\boxed{" + "1" * 1001 + "}") is None


@given(st.recursive(st.text("ab ", min_size=1), lambda inner: st.builds("x{{{}}}y".format, inner), max_leaves=4))
def test_balanced_content_comes_back(content: str) -> None:
    assert last_boxed(f"before {{ \\boxed{{{content}}} after }}") == (content.strip() or None)
