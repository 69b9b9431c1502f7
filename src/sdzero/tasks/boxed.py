r"""Extraction of the final answer: the last balanced `\boxed{...}` after a response's thinking."""

from __future__ import annotations

import re


def last_boxed(text: str, max_length: int = 1000) -> str | None:
    r"""Return the stripped content of the last `\boxed{...}` whose braces balance.

    Linear time, also for a response full of unclosed boxes.

    Returns:
        None if there is none, or if its content is empty or longer than `max_length` characters.
    """
    open_braces: list[int | None] = []  # start of a box's content; None for any other brace
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


def strip_thinking(response: str) -> str:
    """Return the text after the last `</think>`; empty if thinking started but did not end.

    A response need not contain `<think>` itself: some chat templates put it into the prompt.
    """
    rest = response.rpartition("</think>")[2]
    return "" if "<think>" in rest else rest
