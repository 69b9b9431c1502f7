"""Which split a question belongs to: a hash of what makes it that question, so splits are disjoint by construction."""

from __future__ import annotations

from collections.abc import Iterable

from sdzero.seeds import derive_seed
from sdzero.types import Question, Split

_PATIENCE = 20_000  # draws without a new question after which a random stream counts as exhausted


def split_of(identity: str) -> Split:
    """eval (2/10), phase1 (4/10) or phase2 (4/10). No seed enters: a question keeps its split in every run."""
    tenth = derive_seed("split", identity) % 10
    return "eval" if tenth < 2 else "phase1" if tenth < 6 else "phase2"


def take(split: Split, num_questions: int, stream: Iterable[tuple[str, Question]], name: str) -> list[Question]:
    """The first `num_questions` distinct questions of `split` in a stream of (identity, question).

    Args:
        split: phase1, phase2 or eval.
        num_questions: how many; a longer list starts with the shorter ones.
        stream: always the same questions in the same order; identity decides the split and what is a duplicate.
        name: of the task, for the error message.

    Raises:
        ValueError: the stream ends, or repeats itself only, before there are enough.
    """
    seen: set[str] = set()
    questions: list[Question] = []
    repeats = 0
    for identity, question in stream if num_questions > 0 else ():
        repeats = repeats + 1 if identity in seen else 0
        if repeats == 0 and split_of(identity) == split:
            questions.append(question)
            if len(questions) == num_questions:
                break
        if repeats == _PATIENCE:
            break
        seen.add(identity)
    if len(questions) < num_questions:
        raise ValueError(
            f"num_questions={num_questions}, but split {split!r} of task {name!r} holds only {len(questions)}: "
            "ask for fewer, or widen the task's settings"
        )
    return questions
