"""Comparison of a mathematical answer with the gold answer: exact for numbers and words, else by math-verify.

math-verify parses LaTeX into sympy, which may take unbounded time or memory on model output. Run `compare` and `check`
in a `GraderPool`; `decide` is safe anywhere and settles most answers.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from typing import Any, cast

from sdzero.types import Verdict

Item = tuple[str | None, str]  # (answer, gold) is a comparison; (None, gold) checks that gold is gradable
_ANSWER = r"\frac{x+1}{2}"
# loads everything that grading needs; and the verdict to expect
WARM_UP: tuple[Item, Verdict] = ((_ANSWER, r"\frac{1}{2}(1+x)"), Verdict(1, "correct", _ANSWER))

_SPACE = r"(?:\\[,;:! ]|~|\{,\}|\\thinspace\b|\\quad\b)"
_REPLACED = (
    (re.compile(r"(?<!\\)\$"), " "),
    (re.compile(rf"(?<=\d){_SPACE}+(?=\d)"), ""),  # math-verify reads 12\,000 as a product
    (re.compile(r"\\[!,;:]|\\displaystyle\b|~"), " "),
    (re.compile(r"\\(?:boldsymbol|bm|mathsf|emph|underline|textstyle)\b"), r"\\mathbf"),
    (re.compile(r"\\varnothing\b"), r"\\emptyset "),
    (re.compile(r"\\(?:left|right)\b(?=\s*\.)\s*\.|\\[Bb]igg?[lr]?\b"), ""),
    (re.compile(r"^\s*(?:\\approx|\\simeq|=)(?![a-zA-Z])"), ""),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^-(\d+|[a-zA-Z])"), r"^{-\1}"),
    (re.compile(r"√\s*(\d+|\w|(?=[({]))"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\{\}"), r"\\sqrt "),
    (re.compile(r"\^\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm)\{\s*)?[CF]\b\}?$"), ""),  # degrees of temperature
    (re.compile(r"(?<=\d)\s*(?:dollars?|cents?|degrees?|units?|km/h|m/s|mph)\.?$"), ""),
    (re.compile(r"^[€£]\s*(?=\d)"), ""),
)
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:[ ,]\d{3})+(?:\.\d+)?")
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)(?:\\overline\{?(\d+)\}|\\(?:bar|dot)\{?(\d)\}?|\((\d+)\))")
_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)"
_FRACTION = re.compile(
    rf"([+-]?)\\[dtc]?frac\s*(?:\{{({_NUMBER})\}}|(\d))\s*(?:\{{({_NUMBER})\}}|(\d))|({_NUMBER})/(\d+)"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}\\$]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’ -]*")
_PROSE = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3,}[:;.]?\s+){2}[A-Za-z]{3,}\b(?!\()")
_BASE = re.compile(r"\d+_(?:\{(\d+)\}|(\d))")

_REJECTED = re.compile(
    r"\d{400}"  # far more digits than a real answer has
    r"|\^\s*\{?\s*\(?-?\d{6}"  # powers too large for memory
    r"|(?:\^[\s{(]*[\w.!\\]*[\s]*){4}"  # towers
    r"|\d{5,}\s*\)?!|!\s*\)?!"  # factorials of large numbers or of factorials
)
_MAX_DEPTH = 12  # parsing takes seconds at depth 14 and does not end at 20
MAX_LENGTH = 1000  # characters of an answer


def normalize(text: str) -> str:
    """Normalize a LaTeX answer: strip delimiters and spacing, and use the forms that math-verify parses."""
    text = text.strip()
    text = text.removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]")
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    if _GROUPED.fullmatch(text):
        text = re.sub("[ ,]", "", text)
    return _REPEATING.sub(_repeating, text)


def _repeating(match: re.Match[str]) -> str:
    r"""Convert a repeating decimal such as 0.1\overline{6} to a fraction; math-verify truncates it at the bar."""
    sign, whole, fixed, *repeated = match.groups()
    cycle = next(part for part in repeated if part)
    scale = 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), scale) + Fraction(int(cycle), scale * (10 ** len(cycle) - 1))
    return rf"{sign}\frac{{{value.numerator}}}{{{value.denominator}}}"


def number(text: str) -> Fraction | None:
    r"""Parse an integer, a decimal, a/b or \frac{a}{b} in ASCII digits; None for anything else."""
    if not text.isascii():
        return None
    if re.fullmatch(_NUMBER, text):
        return Fraction(text)
    if match := _FRACTION.fullmatch(text):
        sign, above, above_digit, below, below_digit, left, right = match.groups()
        numerator, denominator = Fraction(above or above_digit or left), Fraction(below or below_digit or right)
        if denominator:
            return numerator / denominator * (-1 if sign == "-" else 1)
    return None


def words(text: str) -> str | None:
    r"""Normalize an answer in words such as `\text{Yes}` or `no solution` to lower case; None if it may be a formula.

    Up to three letters outside \text count as a product of variables.
    """
    marked = _WRAPPED.fullmatch(text)
    phrase = " ".join((marked[1] if marked else text).split()).strip("().")
    if not _WORDS.fullmatch(phrase) or len(phrase) < (2 if marked else 4):
        return None
    return phrase.lower()


def rejectable(text: str) -> bool:
    """Detect text to reject without parsing: no real answer looks so, and parsing would run into the deadline."""
    depth = deepest = 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    return deepest > _MAX_DEPTH or bool(_REJECTED.search(text))


def decide(answer: str | None, gold: str) -> Verdict | None:
    """Grade without algebra; None where `compare` must decide.

    Args:
        answer: LaTeX of the final answer; None if the response has none.
        gold: LaTeX of the gold answer.
    """
    if answer is None or len(answer) > MAX_LENGTH:
        return Verdict(0, "unparseable")
    read, expected = normalize(answer), normalize(gold)
    if not read:
        return Verdict(0, "unparseable")
    if read == expected:
        return Verdict(1, "correct", answer)
    value, right = number(read), number(expected)
    if value is not None and right is not None:
        if value == right:
            return Verdict(1, "correct", answer)
        if "." not in read + expected:  # decimals may be rounded, which math-verify allows for
            return Verdict(0, "wrong", answer)
    if rejectable(read):
        return Verdict(0, "unparseable")
    if (phrase := words(expected)) is not None:
        marked = read if _WRAPPED.fullmatch(read) else rf"\text{{{read}}}"
        return Verdict(1, "correct", answer) if words(marked) == phrase else Verdict(0, "wrong", answer)
    return None


def compare(pair: tuple[str, str]) -> Verdict:
    """Grade an (answer, gold) pair by math-verify. May never return: run it in a killable process."""
    answer, gold = pair
    read, expected = normalize(answer), normalize(gold)
    parsed, right = _parse(read), _parse(expected)
    if not parsed:
        return Verdict(0, "unparseable")
    same = bool(right) and _same_form(read, expected) and _equation_fits(parsed[0], right[0]) and _equal(right, parsed)
    return Verdict(1, "correct", answer) if same else Verdict(0, "wrong", answer)


def check(gold: str) -> str | None:
    """Return why a gold answer is not gradable, or None. May never return: run it in a killable process."""
    if (known := check_quickly(gold)) is not None:
        return known or None
    parsed = _parse(normalize(gold))
    if not parsed:
        return "math-verify cannot parse it"
    return None if _equal(parsed, parsed) else "math-verify finds it unequal to itself"


def check_quickly(gold: str) -> str | None:
    """Check a gold answer without algebra: a reason, "" if it is gradable, None where `check` must decide."""
    if len(gold) > MAX_LENGTH:
        return f"it has more than {MAX_LENGTH} characters"
    expected = normalize(gold)
    if not expected:
        return "it is empty"
    if expected.lower() in ("proof", "notfound"):  # markers of data sets for a question without an answer
        return f"it is {gold!r}"
    if number(expected) is not None or words(expected) is not None:
        return ""
    if _PROSE.search(re.sub(r"\{[^{}]*\}", "{}", expected)):  # math-verify reads a product of letters
        return "it is a sentence"
    return "it is nested too deeply, or too large a number" if rejectable(expected) else None


def work(item: Item) -> Any:
    """Run the `compare` or `check` of one item; the function of the worker pool."""
    from sympy.core.random import seed

    answer, gold = item
    seed(0)  # sympy tests identities at random points; verdicts must not depend on earlier items
    return check(gold) if answer is None else compare((answer, gold))


def _parse(text: str) -> list[Any]:
    """Parse a whole LaTeX text by math-verify; empty if it cannot be parsed.

    Its fallback, which extracts the first number, would read 2 from `2**3` and 0 from `0.(3)`.
    """
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    try:
        return parse(
            f"${text}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=cast(Any, None), raise_on_error=True
        )
    except (MemoryError, ImportError):  # not caused by the text
        raise
    except Exception:  # noqa: BLE001 - ANTLR and sympy raise nearly any exception on such text
        return []


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    try:
        return verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
    except (MemoryError, ImportError):  # not caused by the text
        raise
    except Exception:  # noqa: BLE001 - as in _parse
        return False


def _same_form(read: str, expected: str) -> bool:
    r"""Reject pairs that math-verify wrongly accepts: the set \{1,2\} for the pair (1,2), 12_5 for 12_3."""
    base, right_base = (_BASE.fullmatch(text) for text in (read, expected))
    if base and right_base and base.groups() != right_base.groups():
        return False
    pair, braced = (
        [bool(re.fullmatch(pattern, text, re.DOTALL)) for text in (read, expected)]
        for pattern in (r"\([^()]*\)", r"\\\{.*\\\}")
    )
    return not ((pair[0] and braced[1]) or (braced[0] and pair[1]))


def _equation_fits(answer: Any, gold: Any) -> bool:
    """Accept an equation for a gold answer that is a number only if each numeric side equals it.

    `x = 5` and `3 + 2 = 5` count as 5. `6 = 5` does not; math-verify would compare its last side only.
    """
    from sympy import Eq

    relations = [part for part in (answer, *getattr(answer, "args", ())) if isinstance(part, Eq)]
    if isinstance(gold, Eq) or not relations or not getattr(gold, "is_number", False):
        return True
    sides = [side for relation in relations for side in (relation.lhs, relation.rhs)]
    return all(_equal([gold], [side]) for side in sides if getattr(side, "is_number", False))
