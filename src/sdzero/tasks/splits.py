"""Which split a question belongs to: a hash of what makes it that question, or its place in a data set.

Either way splits are disjoint by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sdzero.types import Question, Split
from sdzero.utils.seeds import derive_seed

_PATIENCE = 20_000  # draws without a new question after which a random stream counts as exhausted


def split_of(identity: str) -> Split:
    """eval (2/10), phase1 (4/10) or phase2 (4/10). No seed enters: a question keeps its split in every run."""
    tenth = derive_seed("split", identity) % 10
    return "eval" if tenth < 2 else "phase1" if tenth < 6 else "phase2"


def take(split: Split, num_questions: int | None, stream: Iterable[tuple[str, Question]], name: str) -> list[Question]:
    """The first `num_questions` distinct questions of `split` in a stream of (identity, question).

    Args:
        split: phase1, phase2 or eval.
        num_questions: how many; a longer list starts with the shorter ones.
        stream: always the same questions in the same order; identity decides the split and what is a duplicate.
        name: of the task, for the error message.

    Raises:
        ValueError: the stream ends, or repeats itself only, before there are enough; `num_questions` is None.
    """
    if num_questions is None:
        raise ValueError(f"task {name!r} makes questions without an end: say how many, num_questions")
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


@dataclass(frozen=True)
class Sizes:
    """Splits by number, as in section 3.1 and appendix C.1: `eval` is drawn at random from the whole, the first of the
    rest, in the order of the data set, are phase1, and those after them phase2.

    Where there are too few, phase1 and phase2 shrink in proportion, with a warning.

    Args:
        phase1: questions of phase 1.
        phase2: questions of phase 2.
        eval: held-out questions.
        seed: of the draw of the held-out ones.
    """

    phase1: int = 10_000
    phase2: int = 9_000
    eval: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("phase1", "phase2", "eval"):
            if getattr(self, name) < 0:
                raise ValueError(f"task.sizes.{name} must be at least 0, got {getattr(self, name)}")

    def of(self, split: Split) -> int:
        return getattr(self, split)


Gradable = Callable[[Sequence[Question]], list[Question]]
Families = dict[str, list[Question]]


def deal(questions: Sequence[Question], sizes: Sizes, gradable: Gradable) -> list[tuple[Split, Question]]:
    """The questions of each split, in their order. The questions of a family stay together, so a split may hold a few
    more than its size.

    Args:
        questions: all there are.
        sizes: how many each split is to have.
        gradable: those of some questions that can be graded, in order; few more are handed to it than are needed.
    """
    families: Families = {}
    for question in questions:
        families.setdefault(question.identity, []).append(question)
    shuffled = sorted(families, key=lambda family: derive_seed(sizes.seed, "held out", family))
    held_out = _first(shuffled, families, sizes.eval, gradable)
    rest = [family for family in families if family not in held_out]
    widest = max(map(len, families.values()), default=0)  # by so much may phase1 be larger than its size
    training = _first(rest, families, sizes.phase1 + sizes.phase2 + widest, gradable)
    num, wanted = sum(map(len, training.values())), sizes.phase1 + sizes.phase2
    share = min(1.0, num / max(wanted, 1))
    splits: dict[str, Split] = dict.fromkeys(held_out, "eval")
    room: dict[Split, int] = {"phase1": round(share * sizes.phase1), "phase2": wanted if share < 1 else sizes.phase2}
    for family, members in training.items():
        split: Split = "phase1" if room["phase1"] > 0 else "phase2"
        if room[split] > 0:
            splits[family] = split
            room[split] -= len(members)
    dealt = {**held_out, **training}
    return [(splits[family], question) for family in families if family in splits for question in dealt[family]]


def _first(order: Sequence[str], families: Families, num: int, gradable: Gradable) -> Families:
    """The first families, with their gradable questions, that together have at least `num` of these; all if too few."""
    chosen: Families = {}
    start = found = 0
    while found < num and start < len(order):
        chunk = order[start : start + max(256, num - found)]
        start += len(chunk)
        kept = {question.id for question in gradable([q for family in chunk for q in families[family]])}
        for family in chunk:
            members = [question for question in families[family] if question.id in kept]
            if members and found < num:
                chosen[family] = members
                found += len(members)
    return chosen
