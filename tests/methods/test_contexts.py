"""User messages of the teacher contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdzero.methods import Context, Demonstration, Feedback, FinalAnswer, Plain
from sdzero.types import ScoredRollout, Verdict
from support.prompt_builders import QUESTION, qwen3, scored

QWEN3 = qwen3()


def read(context: Context, item: ScoredRollout, siblings: list[ScoredRollout]) -> str:
    """The user's message of a teacher context."""
    text = QWEN3.tokenizer.decode(context(QWEN3, item, siblings).token_ids)
    assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    return text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")


def test_plain_reads_the_question_and_final_answer_the_gold_answer_too():
    item = scored(QWEN3, (5,), 0)
    assert read(Plain(), item, [item]) == QUESTION.text
    assert read(FinalAnswer(), item, [item]) == f"{QUESTION.text}\n\nThe correct final answer is: 42"
    assert read(FinalAnswer("{answer}! {question}"), item, [item]) == f"42! {QUESTION.text}"


def test_demonstration_reads_the_solution_and_says_where_one_is_missing():
    item = scored(QWEN3, (5,), 0)
    assert QUESTION.meta["solution"] in read(Demonstration(), item, [item])
    proof = replace(item.rollout.prompt, question=replace(QUESTION, meta={"proof": "by {braces}"}))
    other = replace(item, rollout=replace(item.rollout, prompt=proof))
    assert read(Demonstration("{demonstration} {question}", "proof"), other, []) == f"by {{braces}} {QUESTION.text}"
    with pytest.raises(ValueError, match=r"question 'q1' has no meta\['solution'\].* meta_key, or use FinalAnswer"):
        Demonstration()(QWEN3, other, [])


def test_feedback_reads_the_verdict():
    head = f"{QUESTION.text}\n\nFeedback on an earlier attempt: "
    wrong, unread = scored(QWEN3, (5,), 0, "x", "32"), scored(QWEN3, (5,), 0, "x")
    assert read(Feedback(), wrong, [wrong]) == head + "wrong (answer read: 32)."
    assert read(Feedback(), unread, [unread, wrong]) == head + "wrong."
    right = scored(QWEN3, (6,), 1, "mine")
    assert read(Feedback(), right, [wrong, right]) == head + "correct."
    assert read(Feedback("{feedback}|{question}"), wrong, []) == f"wrong (answer read: 32).|{QUESTION.text}"


def test_feedback_reads_the_first_success_of_a_sibling_never_its_own():
    wrong, first, second = scored(QWEN3, (5,), 0, "bad"), scored(QWEN3, (6,), 1, "one"), scored(QWEN3, (7,), 1, "two")
    group = [wrong, first, second]
    assert read(Feedback(), wrong, group).endswith("wrong.\nA correct attempt was:\none")
    assert read(Feedback(), first, group).endswith("correct.\nA correct attempt was:\ntwo")
    assert read(Feedback(), second, group).endswith("correct.\nA correct attempt was:\none")


def test_a_question_may_hold_braces():
    odd = replace(scored(QWEN3, (5,), 0).rollout, prompt=QWEN3.prompt(replace(QUESTION, text="sum {x} of {0}")))
    for context in (Demonstration(), FinalAnswer(), Feedback()):
        assert read(context, ScoredRollout(odd, Verdict(0, "wrong")), []).startswith("sum {x} of {0}\n")
