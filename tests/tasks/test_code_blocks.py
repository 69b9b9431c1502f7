"""Extraction of the program of a response: its last closed fenced block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.tasks.code import last_block


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("```cpp\na\n```", "a\n"),
        ("so:\n```cpp\na\n\n b\n```\nDone.", "a\n\n b\n"),
        ("```C++\na\n```", "a\n"),
        ("```cc\na\n```", "a\n"),
        ("``` cxx title=x\na\n```", "a\n"),
        ("````cpp\n```\na\n````", "```\na\n"),
        ("```cpp\na\n`````", "a\n"),
        ("```cpp\r\na\r\n```\r\n", "a\r\n"),
        ("1. it is\n   ```cpp\n   if\n     a\n b\n   ```", "if\n  a\nb\n"),
        ("```cpp\na\n```\n```cpp\nb\n```", "b\n"),
        ("```cpp\na\n```\nand it prints\n```text\n5\n```", "a\n"),
        ("```cpp\na\n```\n```python\nb\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```cpp\na\n```\nbetter:\n```\nb\n```", "b\n"),
        ("```\na\n```\n```text\nb\n```", None),
        ("```python\na\n```", None),
        ("```cpp\na\n```\n```cpp\nb", "a\n"),  # the last one was cut off
        ("```cpp\ndraft\nno, again:\n```cpp\nb\n```", "b\n"),  # the draft was given up
        ("```cpp\na", None),
        ("```cpp a ```", None),
        ("`cpp a`", None),
        ("    ```cpp\n    a\n    ```", None),  # quoted text
        ("```cpp\n```", "\n"),
        ("", None),
        ("```", None),
    ],
)
def test_the_last_closed_block(text: str, source: str | None) -> None:
    assert last_block(text, "cpp") == source


def test_names_of_python() -> None:
    for name in ("python", "python3", "py", "Python"):
        assert last_block(f"```{name}\na\n```", "python") == "a\n"
        assert last_block(f"```{name}\na\n```", "cpp") is None


@given(st.text("`cp+\n a", max_size=60))
def test_any_text_has_a_block_or_none(text: str) -> None:
    source = last_block(text, "cpp")
    assert source is None or source.rstrip("\n") in text or " " in text
    assert last_block(f"{text}\n```python\n1\n```\n```cpp\nb\n```", "cpp") == "b\n"
