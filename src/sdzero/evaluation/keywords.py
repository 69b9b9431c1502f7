"""Self-revision keywords of the paper (appendix E.1), and their places in a text."""

from __future__ import annotations

import re

KEYWORDS = (
    "wait",
    "hold on",
    "actually",
    "on second thought",
    "let me recheck",
    "let's recheck",
    "let me check",
    "let's check",
    "let me recalculate",
    "let's recalculate",
    "let me correct",
    "my mistake",
    "i made a mistake",
    "this is wrong",
    "that is wrong",
    "that's wrong",
    "incorrect",
    "re-evaluate",
    "let's re-evaluate",
    "let me rethink",
    "let's rethink",
    "let me double check",
    "let's double check",
    "wait a minute",
    "let me start over",
    "let me try again",
    "oops",
)


_PATTERNS = [
    re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, keyword.split())) + r"(?!\w)", re.IGNORECASE)
    for keyword in KEYWORDS
]


def keyword_spans(text: str) -> list[tuple[int, int]]:
    """Find keywords as whole words, in any case, with straight or curly apostrophes.

    Returns:
        (begin, end) of each, the longest first; of two that overlap, only the longer.
    """
    plain = text.replace("’", "'").replace("‘", "'")
    spans = [match.span() for pattern in _PATTERNS for match in pattern.finditer(plain)]
    kept: list[tuple[int, int]] = []
    for begin, end in sorted(spans, key=lambda span: (span[0] - span[1], span[0])):
        if all(end <= other_begin or begin >= other_end for other_begin, other_end in kept):
            kept.append((begin, end))
    return kept


def count_keywords(text: str) -> int:
    """Count the keywords of a text."""
    return len(keyword_spans(text))
