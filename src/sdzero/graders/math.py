"""Whether a mathematical answer equals the gold answer: exactly where both are numbers or words, else by math-verify.

math-verify parses LaTeX into sympy, which may take for ever, or all memory, on what a model writes. So `compare` and
`check` belong into a `GraderPool`; `decide` is safe anywhere and settles most answers.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from typing import Any, cast

from sdzero.types import Verdict

Job = tuple[str | None, str]  # (answer, gold): compare them; (None, gold): can it be graded?
_ANSWER = r"\frac{x+1}{2}"
# a pair that loads what grading loads, and its verdict
WARM_UP: tuple[Job, Verdict] = ((_ANSWER, r"\frac{1}{2}(1+x)"), Verdict(1, "correct", _ANSWER))

_SPACE = r"(?:\\[,;:! ]|~|\{,\}|\\thinspace\b|\\quad\b)"
_REPLACED = (
    (re.compile(r"(?<!\\)\$"), " "),
    (re.compile(rf"(?<=\d){_SPACE}+(?=\d)"), ""),  # 12\,000 is one number, which math-verify reads as a product
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

_HOPELESS = re.compile(
    r"\d{400}"  # more digits than any answer has
    r"|\^\s*\{?\s*\(?-?\d{6}"  # powers of more digits than memory holds
    r"|(?:\^[\s{(]*[\w.!\\]*[\s]*){4}"  # towers
    r"|\d{5,}\s*\)?!|!\s*\)?!"  # factorials of large numbers, or of factorials
)
_MAX_DEPTH = 12  # the parser takes seconds at 14, and for ever at 20
MAX_LENGTH = 1000  # characters of an answer


def plain(text: str) -> str:
    """A LaTeX answer without its dollar signs and spacing, in the forms that math-verify reads."""
    text = text.strip()
    text = text.removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]")
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    if _GROUPED.fullmatch(text):
        text = re.sub("[ ,]", "", text)
    return _REPEATING.sub(_repeating, text)


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as the fraction that it is; math-verify cuts it off at the bar."""
    sign, whole, fixed, *repeated = match.groups()
    cycle = next(part for part in repeated if part)
    scale = 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), scale) + Fraction(int(cycle), scale * (10 ** len(cycle) - 1))
    return rf"{sign}\frac{{{value.numerator}}}{{{value.denominator}}}"


def number(text: str) -> Fraction | None:
    r"""The value of an integer, a decimal, a/b or \frac{a}{b} in ASCII digits; None for anything else."""
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
    r"""What an answer in words says: `\text{Yes}` and `no solution`, in lower case; None where it may be a formula.

    Three letters and fewer, not marked as text, are a product of variables.
    """
    marked = _WRAPPED.fullmatch(text)
    said = " ".join((marked[1] if marked else text).split()).strip("().")
    if not _WORDS.fullmatch(said) or len(said) < (2 if marked else 4):
        return None
    return said.lower()


def hopeless(text: str) -> bool:
    """Whether a text is turned away unread: nobody's answer, and the deadline's worth of work for a worker."""
    depth = deepest = 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    return deepest > _MAX_DEPTH or bool(_HOPELESS.search(text))


def decide(answer: str | None, gold: str) -> Verdict | None:
    """The verdict that needs no algebra; None where `compare` must say.

    Args:
        answer: the final answer's LaTeX; None where a response states none.
        gold: the gold answer's LaTeX.
    """
    if answer is None:
        return Verdict(0, "unparseable")
    if len(answer) > MAX_LENGTH:
        return Verdict(0, "unparseable")
    read, expected = plain(answer), plain(gold)
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
    if hopeless(read):
        return Verdict(0, "unparseable")
    if (said := words(expected)) is not None:
        return Verdict(1, "correct", answer) if words(_marked(read)) == said else Verdict(0, "wrong", answer)
    return None


def _marked(text: str) -> str:
    """Marks an answer as text, so that it is held against a gold answer that is."""
    return text if _WRAPPED.fullmatch(text) else rf"\text{{{text}}}"


def compare(pair: tuple[str, str]) -> Verdict:
    """The verdict on an (answer, gold) by math-verify. May take for ever: run it where it can be killed."""
    answer, gold = pair
    read, expected = plain(answer), plain(gold)
    parsed, right = _parse(read), _parse(expected)
    if not parsed:
        return Verdict(0, "unparseable")
    same = bool(right) and _alike(read, expected) and _fits(parsed[0], right[0]) and _equal(right, parsed)
    return Verdict(1, "correct", answer) if same else Verdict(0, "wrong", answer)


def check(gold: str) -> str | None:
    """Why a gold answer cannot be graded; None if it can. May take for ever: run it where it can be killed."""
    if (known := check_quickly(gold)) is not None:
        return known or None
    parsed = _parse(plain(gold))
    if not parsed:
        return "math-verify cannot parse it"
    return None if _equal(parsed, parsed) else "math-verify finds it unequal to itself"


def check_quickly(gold: str) -> str | None:
    """What `check` says without algebra: a reason, "" for a gold answer that can be graded; None where `check` must."""
    if len(gold) > MAX_LENGTH:
        return f"it has more than {MAX_LENGTH} characters"
    expected = plain(gold)
    if not expected:
        return "it is empty"
    if expected.lower() in ("proof", "notfound"):  # how data sets mark a question without an answer
        return f"it is {gold!r}"
    if number(expected) is not None or words(expected) is not None:
        return ""
    if _PROSE.search(re.sub(r"\{[^{}]*\}", "{}", expected)):  # math-verify reads a product of letters
        return "it is a sentence"
    return "it is nested too deep, or a number beyond reckoning" if hopeless(expected) else None


def work(job: Job) -> Any:
    """What a worker does: the `compare` or the `check` that a job asks for."""
    from sympy.core.random import seed

    answer, gold = job
    seed(0)  # sympy tries identities at random points; the verdict must not depend on what came before
    return check(gold) if answer is None else compare((answer, gold))


def needs_math_verify() -> None:
    """Raises: ModuleNotFoundError naming the extra, where math-verify is not installed."""
    try:
        import math_verify  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'grading mathematics needs the package math-verify: pip install "sdzero[math]"', name=error.name
        ) from error


def _parse(text: str) -> list[Any]:
    """math-verify's reading of a LaTeX text as a whole; empty if it has none.

    Its other way, which picks the first number out of a text, would read 2 in `2**3` and 0 in `0.(3)`.
    """
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    try:
        return parse(
            f"${text}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=cast(Any, None), raise_on_error=True
        )
    except (MemoryError, ImportError):  # nothing of the text's
        raise
    except Exception:  # noqa: BLE001 - ANTLR and sympy raise nearly everything on a text that they cannot read
        return []


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    try:
        return verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
    except (MemoryError, ImportError):  # nothing of the text's
        raise
    except Exception:  # noqa: BLE001 - as in _parse
        return False


def _alike(read: str, expected: str) -> bool:
    r"""What math-verify forgives and should not: a set \{1,2\} for the pair (1,2), 12_5 for 12_3."""
    base, right_base = (_BASE.fullmatch(text) for text in (read, expected))
    if base and right_base and base.groups() != right_base.groups():
        return False
    pair, braced = (
        [bool(re.fullmatch(pattern, text, re.DOTALL)) for text in (read, expected)]
        for pattern in (r"\([^()]*\)", r"\\\{.*\\\}")
    )
    return not ((pair[0] and braced[1]) or (braced[0] and pair[1]))


def _fits(answer: Any, gold: Any) -> bool:
    """Whether an answer that is an equation may stand for a gold answer that is none.

    `x = 5` and `3 + 2 = 5` may stand for 5. `6 = 5` may not: math-verify looks at its last side only. So of an
    equation's sides, each that is a number must be the gold answer.
    """
    from sympy import Eq

    relations = [part for part in (answer, *getattr(answer, "args", ())) if isinstance(part, Eq)]
    if isinstance(gold, Eq) or not relations or not getattr(gold, "is_number", False):
        return True
    sides = [side for relation in relations for side in (relation.lhs, relation.rhs)]
    return all(_equal([gold], [side]) for side in sides if getattr(side, "is_number", False))
