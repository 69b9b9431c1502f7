"""Disjoint splits: by a hash of a question's identity, or by the number of questions each split should have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sdzero.types import Question, Split
from sdzero.utils.seeds import derive_seed

_MAX_REPEATS = 20_000  # consecutive duplicates after which a random stream counts as exhausted


def split_of(identity: str) -> Split:
    """Return eval (2/10), phase1 (4/10) or phase2 (4/10) by hash, without a seed: the same split in every run."""
    tenth = derive_seed("split", identity) % 10
    return "eval" if tenth < 2 else "phase1" if tenth < 6 else "phase2"


def take(split: Split, num_questions: int | None, stream: Iterable[tuple[str, Question]], name: str) -> list[Question]:
    """Return the first `num_questions` distinct questions of `split` in a deterministic stream of task `name`.

    The stream yields (identity, question); the identity decides the split and what is a duplicate.

    Raises: ValueError if the stream ends, or only repeats itself, before there are enough; or if all are requested.
    """
    if num_questions is None:
        raise ValueError(f"task {name!r} generates questions endlessly: set num_questions")
    seen: set[str] = set()
    questions: list[Question] = []
    repeats = 0
    for identity, question in stream if num_questions > 0 else ():
        repeats = repeats + 1 if identity in seen else 0
        if repeats == 0 and split_of(identity) == split:
            questions.append(question)
            if len(questions) == num_questions:
                break
        if repeats == _MAX_REPEATS:
            break
        seen.add(identity)
    if len(questions) < num_questions:
        raise ValueError(
            f"num_questions={num_questions}, but split {split!r} of task {name!r} holds only {len(questions)}: "
            "request fewer, or widen the task's settings"
        )
    return questions


@dataclass(frozen=True)
class Sizes:
    """Split sizes (section 3.1, appendix C.1): `eval` is a random sample, phase1 the first of the rest in the order of
    the data set, phase2 those after them.

    If there are too few questions, phase1 and phase2 shrink in proportion, with a warning.

    Args:
        phase1: number of questions of phase 1.
        phase2: number of questions of phase 2.
        eval: number of held-out questions.
        seed: seed of the held-out sample.
    """

    phase1: int = 10_000
    phase2: int = 9_000
    eval: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("phase1", "phase2", "eval"):
            if getattr(self, name) < 0:
                raise ValueError(f"task.sizes.{name} must be non-negative, got {getattr(self, name)}")


Gradable = Callable[[Sequence[Question]], list[Question]]
Families = dict[str, list[Question]]


def assign_splits(questions: Sequence[Question], sizes: Sizes, gradable: Gradable) -> list[tuple[Split, Question]]:
    """Return the questions of all splits, in their order; `gradable` filters few more of them than needed.

    The questions of a family stay together, so a split may exceed its size by a few.
    """
    families: Families = {}
    for question in questions:
        families.setdefault(question.identity, []).append(question)
    shuffled = sorted(families, key=lambda family: derive_seed(sizes.seed, "held out", family))
    held_out = _take_families(shuffled, families, sizes.eval, gradable)
    rest = [family for family in families if family not in held_out]
    largest = max(map(len, families.values()), default=0)  # phase1 may exceed its size by this much
    training = _take_families(rest, families, sizes.phase1 + sizes.phase2 + largest, gradable)
    num, wanted = sum(map(len, training.values())), sizes.phase1 + sizes.phase2
    share = min(1.0, num / max(wanted, 1))
    splits: dict[str, Split] = dict.fromkeys(held_out, "eval")
    room: dict[Split, int] = {"phase1": round(share * sizes.phase1), "phase2": wanted if share < 1 else sizes.phase2}
    for family, members in training.items():
        split: Split = "phase1" if room["phase1"] > 0 else "phase2"
        if room[split] > 0:
            splits[family] = split
            room[split] -= len(members)
    chosen = {**held_out, **training}
    return [(splits[family], question) for family in families if family in splits for question in chosen[family]]


def _take_families(order: Sequence[str], families: Families, num: int, gradable: Gradable) -> Families:
    """Return the first families, reduced to gradable questions, with at least `num` of these in total; else all."""
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
