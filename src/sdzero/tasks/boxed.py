r"""The last balanced \boxed{...} of a response: where a final answer is read."""

from __future__ import annotations

_OPEN = r"\boxed{"


def last_boxed(text: str, max_length: int = 1000) -> str | None:
    r"""Content of the last `\boxed{...}` whose braces balance, stripped.

    Returns:
        None if there is none, if it is empty, or if it is longer than `max_length` characters.
    """
    start = text.rfind(_OPEN)
    while start >= 0:
        begin = start + len(_OPEN)
        depth = 1
        for position in range(begin, min(len(text), begin + max_length + 1)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin:position].strip() or None
        start = text.rfind(_OPEN, 0, start)
    return None
