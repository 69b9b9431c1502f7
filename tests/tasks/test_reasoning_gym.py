from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from sdzero.tasks import ReasoningGym
from sdzero.tasks.reasoning_gym import SAFE


@pytest.mark.parametrize("dataset", SAFE)
def test_gold_is_correct_and_junk_is_not(dataset: str) -> None:
    task = ReasoningGym(dataset, seed=1)
    for question in task.questions("phase1", 8):
        stored = replace(question, meta=json.loads(json.dumps(dict(question.meta))))
        assert task.verify(stored, rf"\boxed{{{question.answer}}}").reason == "correct"
        assert task.verify(stored, question.answer).reason == "unparseable"
        assert task.verify(stored, r"\boxed{no idea}").reason == "wrong"
        assert task.verify(stored, r"\boxed{" + "9" * 400 + "}").reason == "wrong"
        assert question.text.endswith(r"put your final answer within \boxed{}.")


@pytest.mark.parametrize("dataset", ["countdown", "game_of_life_halting", "nonsense"])
def test_unsafe_generators_are_refused(dataset: str) -> None:
    with pytest.raises(ValueError, match=r"safe.*chain_sum.*word_sorting"):
        ReasoningGym(dataset)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sdzero\[tasks\]"'):
        ReasoningGym("chain_sum")


def test_partial_scores_have_no_reward() -> None:
    """The scorer gives partial credit of 0.9999999 to the correct word with a suffix."""
    task = ReasoningGym("spell_backward")
    questions = task.questions("phase1", 200)
    assert all(task.verify(question, rf"\boxed{{{question.answer}xyz}}").reward == 0 for question in questions)


def test_options_reach_the_generator_and_move_no_question_to_another_split() -> None:
    one, two = (ReasoningGym("chain_sum", seed=seed, options={"max_terms": 2, "max_digits": 1}) for seed in (1, 2))
    held_out = {question.text for question in one.questions("eval", 30)}
    assert not held_out & {question.text for question in two.questions("phase1", 60)}
    assert all(text.count(" + ") + text.count(" - ") == 1 for text in held_out)
