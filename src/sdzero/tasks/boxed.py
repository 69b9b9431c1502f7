r"""Where a final answer is read: the last balanced \boxed{...} of what a response says after its thought."""

from __future__ import annotations

import re


def last_boxed(text: str, max_length: int = 1000) -> str | None:
    r"""Content of the `\boxed{...}` that begins last among those whose braces balance, stripped.

    One pass: a response full of open boxes takes no longer than another.

    Returns:
        None if there is none, or if its content is empty or longer than `max_length` characters.
    """
    open_braces: list[int | None] = []  # where a box's content begins; None for a brace that opens no box
    begin = end = 0
    for brace in re.finditer(r"\\boxed\{|[{}]", text):
        if brace[0] != "}":
            open_braces.append(brace.end() if len(brace[0]) > 1 else None)
        elif open_braces:
            opened = open_braces.pop()
            if opened is not None and opened > begin:
                begin, end = opened, brace.start()
    content = text[begin:end].strip()
    return content if 0 < len(content) <= max_length else None


def after_thought(response: str) -> str:
    """What stands behind the last `</think>`; empty where a thought was begun and not ended. Models that are prompted
    with `<think>` do not write it themselves."""
    rest = response.rpartition("</think>")[2]
    return "" if "<think>" in rest else rest
