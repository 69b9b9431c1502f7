r"""Countdown: reach a target from given numbers with + - * /, using every number exactly once.

The verifier parses the last `\boxed{...}` into a tree of the four operations and integers, and computes it in exact
fractions. A model's text is never evaluated as code: any other tree is `unparseable`.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cached_property

from sdzero.tasks.base import Task
from sdzero.tasks.boxed import last_boxed
from sdzero.tasks.sources import Source, read
from sdzero.tasks.splits import split_of, take
from sdzero.types import Question, Split, Verdict
from sdzero.utils.seeds import derive_seed

MAX_LENGTH = 200  # characters of an expression; bounds the parser's depth
_SYMBOLS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_NODES = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_LATEX = ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), ("×", "*"), ("÷", "/"), ("−", "-"))


def parse(expression: str) -> ast.expr | None:
    """Parse an expression of integers, + - * / and parentheses; None for any other text."""
    if len(expression) > MAX_LENGTH or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        return None
    return tree if _allowed(tree) else None


def _allowed(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return type(node.op) in _NODES and _allowed(node.left) and _allowed(node.right)
    return isinstance(node, ast.Constant) and type(node.value) is int


def numbers_of(tree: ast.expr) -> list[int]:
    """Return the integers in a tree, sorted."""
    return sorted(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is int)


def value_of(tree: ast.expr) -> Fraction:
    """Compute the exact value of a tree from `parse`. Raises: ZeroDivisionError."""
    if isinstance(tree, ast.BinOp):
        return _NODES[type(tree.op)](value_of(tree.left), value_of(tree.right))
    assert isinstance(tree, ast.Constant) and type(tree.value) is int
    return Fraction(tree.value)


class Countdown(Task):
    r"""Random or published Countdown questions; the answer is an expression in `\boxed{}`.

    Args:
        seed: seed of the question stream; the split of a question does not depend on it.
        min_numbers: minimum count of numbers.
        max_numbers: maximum count of numbers.
        max_value: maximum of numbers and target; both start at 1.
        path: file or data set with the columns `target` and `nums`, instead of the stream, such as
            Jiayi-Pan/Countdown-Tasks-3to4. Rows that differ only in the order of numbers are duplicates. A question
            has the same id and split as in the stream, and an empty gold answer.
    """

    def __init__(
        self,
        seed: int = 0,
        min_numbers: int = 3,
        max_numbers: int = 4,
        max_value: int = 99,
        path: Source | None = None,
    ) -> None:
        if not 2 <= min_numbers <= max_numbers <= 6:
            raise ValueError(f"min_numbers={min_numbers}, max_numbers={max_numbers}: 2 <= min <= max <= 6 must hold")
        if max_value < 2:
            raise ValueError(f"max_value must be at least 2, got {max_value}")
        self.seed, self.min_numbers, self.max_numbers, self.max_value = seed, min_numbers, max_numbers, max_value
        self.path = path

    def _stream(self) -> Iterator[tuple[str, Question]]:
        rng = random.Random(derive_seed(self.seed, "countdown", "questions"))
        while True:
            numbers = [rng.randint(1, self.max_value) for _ in range(rng.randint(self.min_numbers, self.max_numbers))]
            expression, target = _random_expression(numbers, rng)
            if 1 <= target <= self.max_value:
                yield _question(numbers, int(target), expression)

    @cached_property
    def _published(self) -> dict[str, Question]:
        """The distinct questions of `path` by identity. Raises: ValueError naming a row without integers."""
        assert self.path is not None
        distinct: dict[str, Question] = {}
        for number, row in enumerate(read(self.path, ["target", "nums"]), 1):
            target, nums = row.get("target"), row.get("nums")
            if type(target) is not int or not isinstance(nums, list) or {int} != {*map(type, nums)}:
                raise ValueError(f"{self.path}: row {number}: target and nums must be integers, got {row}")
            distinct.setdefault(*_question(nums, target, ""))
        return distinct

    def questions(self, split: Split, num_questions: int | None) -> list[Question]:
        if self.path is None:
            return take(split, num_questions, self._stream(), "countdown")
        num = sum(split_of(id) == split for id in self._published) if num_questions is None else num_questions
        return take(split, num, self._published.items(), f"countdown: {self.path}")

    def verify(self, question: Question, response: str) -> Verdict:
        expression = last_boxed(response) or ""
        for latex, symbol in _LATEX:
            expression = expression.replace(latex, symbol)
        expression = expression.partition("=")[0].strip()  # of `(1+2)*8 = 24`
        tree = parse(expression)
        if tree is None:
            return Verdict(0, "unparseable")
        return Verdict(1, "correct", expression) if _solves(tree, question) else Verdict(0, "wrong", expression)


def _question(numbers: list[int], target: int, expression: str) -> tuple[str, Question]:
    """Return (identity, question); the identity ignores the order of the numbers."""
    identity = f"{target}:{','.join(map(str, sorted(numbers)))}"
    text = (
        f"Using each of the numbers {numbers} exactly once, write an expression that equals {target}. "
        r"You may use +, -, *, / and parentheses. Put the expression within \boxed{}."
    )
    meta = {"numbers": numbers, "target": target}
    return identity, Question(f"countdown/{identity}", text, expression, meta)


def _solves(tree: ast.expr, question: Question) -> bool:
    if numbers_of(tree) != sorted(question.meta["numbers"]):
        return False
    try:
        return value_of(tree) == question.meta["target"]
    except ZeroDivisionError:
        return False


def _random_expression(numbers: list[int], rng: random.Random) -> tuple[str, Fraction]:
    """Build a random expression over all numbers with its value; every intermediate result is an integer."""
    parts = [(str(number), Fraction(number)) for number in numbers]
    while len(parts) > 1:
        (left, a), (right, b) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        exact = b != 0 and (a / b).denominator == 1
        symbol = rng.choice("+-*/" if exact else "+-*")
        parts.append((f"({left} {symbol} {right})", _SYMBOLS[symbol](a, b)))
    expression, value = parts[0]
    return expression[1:-1], value
