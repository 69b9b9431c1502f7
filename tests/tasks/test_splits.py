from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.tasks import splits
from sdzero.tasks.splits import Sizes, assign_splits, split_of, take
from sdzero.types import Question, Split
from sdzero.utils.seeds import derive_seed


def stream(names: list[str]):
    return ((name, Question(name, name, "")) for name in names)


def test_shares_of_the_splits() -> None:
    counts = Counter(split_of(f"question {i}") for i in range(5000))
    assert counts["eval"] == pytest.approx(1000, abs=100)
    assert counts["phase1"] == pytest.approx(2000, abs=130)
    assert counts["phase2"] == pytest.approx(2000, abs=130)


def test_duplicates_are_dropped_and_order_is_kept() -> None:
    names = [name for name in map(str, range(100)) if split_of(name) == "phase1"][:4]
    doubled = [names[0], names[1], names[0], names[2], names[1], names[3]]
    assert [question.id for question in take("phase1", 4, stream(doubled), "t")] == names


def test_a_finite_stream_that_is_too_small_says_how_many_there_are() -> None:
    names = list(map(str, range(50)))
    there = sum(split_of(name) == "eval" for name in names)
    with pytest.raises(ValueError, match=rf"num_questions=51.*'eval'.*'small'.*only {there}"):
        take("eval", 51, stream(names), "small")


def test_repeating_stream_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "_MAX_REPEATS", 50)

    def endless():
        while True:
            yield from stream(list(map(str, range(20))))

    there = sum(split_of(str(i)) == "phase2" for i in range(20))
    with pytest.raises(ValueError, match=f"only {there}"):
        take("phase2", 21, endless(), "endless")


# --- splits by number -----------------------------------------------------------------------------

Dealt = list[tuple[Split, Question]]


def without(bad: set[str]) -> Callable[[Sequence[Question]], list[Question]]:
    return lambda questions: [question for question in questions if question.id not in bad]


def of(dealt: Dealt, split: Split) -> list[str]:
    return [question.id for name, question in dealt if name == split]


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[list[Question], Sizes, set[str]]:
    """Generate questions, some of them in families, split sizes, and ids of ungradable questions."""
    labels = draw(st.lists(st.one_of(st.just(""), st.sampled_from("abcde")), max_size=40))
    questions = [Question(f"q{number}", "", "", {}, label) for number, label in enumerate(labels)]
    number = st.integers(0, 20)
    sizes = Sizes(draw(number), draw(number), draw(number), draw(st.integers(0, 3)))
    bad = draw(st.sets(st.sampled_from([question.id for question in questions]))) if questions else set()
    return questions, sizes, bad


def slowly(questions: list[Question], sizes: Sizes, bad: set[str]) -> dict[str, Split]:
    """Assign splits by id, literally as section 3.1 and appendix C.1 describe."""
    names = list(dict.fromkeys(question.identity for question in questions))
    members = {name: [q.id for q in questions if q.identity == name and q.id not in bad] for name in names}
    dealt: dict[str, Split] = {}

    def give(order: list[str], split: Split, num: int) -> None:
        for name in order:
            if list(dealt.values()).count(split) < num and not {*members[name]} & {*dealt}:
                dealt.update(dict.fromkeys(members[name], split))

    give(sorted(names, key=lambda name: derive_seed(sizes.seed, "held out", name)), "eval", sizes.eval)
    left = sum(id not in dealt for ids in members.values() for id in ids)
    first, second = sizes.phase1, sizes.phase2
    if left < first + second:
        first, second = round(left / (first + second) * first), left
    give(names, "phase1", first)
    give(names, "phase2", second)
    return dealt


@given(data_sets())
def test_splits_follow_the_paper_and_keep_families_and_order(given: tuple[list[Question], Sizes, set[str]]) -> None:
    questions, sizes, bad = given
    dealt = assign_splits(questions, sizes, without(bad))
    assert {question.id: split for split, question in dealt} == slowly(questions, sizes, bad)
    assert len({question.id for _, question in dealt}) == len(dealt)
    splits_of: dict[str, set[str]] = {}
    for split, question in dealt:
        splits_of.setdefault(question.identity, set()).add(split)
    assert all(len(found) == 1 for found in splits_of.values())
    first = {identity: n for n, identity in reversed([*enumerate(q.identity for q in questions)])}
    for split in ("phase1", "phase2", "eval"):
        order = [first[question.identity] for name, question in dealt if name == split]
        assert order == sorted(order)


@given(data_sets(), st.integers(0, 20), st.integers(0, 20))
def test_what_is_held_out_does_not_depend_on_the_phases(
    given: tuple[list[Question], Sizes, set[str]], phase1: int, phase2: int
) -> None:
    questions, sizes, bad = given
    other = Sizes(phase1, phase2, sizes.eval, sizes.seed)
    dealt = [assign_splits(questions, each, without(bad)) for each in (sizes, other)]
    assert of(dealt[0], "eval") == of(dealt[1], "eval")


def test_the_first_are_phase_1_and_the_next_phase_2() -> None:
    questions = [Question(f"q{number}", "", "") for number in range(3000)]
    dealt = assign_splits(questions, Sizes(100, 90, 50), without(set()))
    held_out = of(dealt, "eval")
    rest = [question.id for question in questions if question.id not in held_out]
    assert of(dealt, "phase1") == rest[:100] and of(dealt, "phase2") == rest[100:190]
    places = [int(id[1:]) for id in held_out]
    assert len(places) == 50 and min(places) < 300 and max(places) > 2700  # from the whole set
    assert of(assign_splits(questions, Sizes(100, 90, 50, seed=1), without(set())), "eval") != held_out


def test_too_few_questions_shrink_both_phases_in_proportion() -> None:
    questions = [Question(f"q{number}", "", "") for number in range(105)]
    dealt = assign_splits(questions, Sizes(10_000, 9_000, 10), without(set()))
    assert [len(of(dealt, split)) for split in ("phase1", "phase2", "eval")] == [50, 45, 10]


def test_only_needed_questions_are_checked() -> None:
    """Checking a gold answer is slow, and the real data set has 90,000."""
    questions = [Question(f"q{number}", "", "") for number in range(20_000)]
    looked_at: list[Question] = []

    def gradable(some: Sequence[Question]) -> list[Question]:
        looked_at.extend(some)
        return without({f"q{number}" for number in range(0, 20_000, 100)})(some)

    dealt = assign_splits(questions, Sizes(1000, 900, 50), gradable)
    assert [len(of(dealt, split)) for split in ("phase1", "phase2", "eval")] == [1000, 900, 50]
    assert len(looked_at) < 3000
