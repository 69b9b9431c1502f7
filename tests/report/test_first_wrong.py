"""The first wrong step of a chain, and its statistics."""

from __future__ import annotations

import random
import re

import pandas as pd
import pytest

from sdzero.report import first_wrong
from support.made_up_run import token_kl_row

END, P0 = "<|end|>", "Wait, this response is not correct, let me start over."
QUESTION = "6+3*9-4="  # 6+3=9*9=1-4=7A7


def split(response):
    """Tokens of the tiny model: characters of a chain one by one, words and blank lines whole."""
    return [*re.findall(r"\n\n|[A-Z]?[a-z]+|.", response), END]


def attempt(response, tokens=None):
    found = first_wrong.first_attempt(f"chains/{QUESTION}", QUESTION, response, tokens or split(response))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("6+3=9*9=1-4=7A7", None),
        ("6+3=8*9=2-4=8A8", 4),  # a wrong step; what follows from it is right as written
        ("6+3=9*9=1-4=6A6", 12),
        ("6+3=9*9=1-4=7A6", 14),  # only the answer is miscopied
        ("6+2=8*9=2-4=8A8", 2),  # a miscopied operand
        ("6+3=9*9=1A1", 9),  # a step left out: at the A, where - should stand
        ("6+3=9*9=1-4=7A7=7", 15),
        ("6+3=9*9=1-4=7", 13),  # ends too early: at its end
        (f"6+3=9*9=1-4=7A7\n\n{P0}\n\n6+3=8*9=2-4=8A8", None),  # a wrong second attempt
        (f"6+3=9*9=1-4=5A5\n\n{P0}\n\n6+3=9*9=1-4=7A7", 12),
        ("", 0),
    ],
)
def test_the_first_wrong_token_is_where_the_first_attempt_leaves_the_right_working(response, found):
    assert attempt(response).first_wrong == found


def test_a_cut_attempt_without_an_error_has_no_wrong_token():
    assert attempt("6+3=9*9", tokens=list("6+3=9*9")).first_wrong is None


def test_a_result_is_wrong_if_it_does_not_follow_from_what_is_written():
    found = attempt("6+3=8*9=2-4=9A9")
    assert found.results == (4, 8, 12) and found.wrong_results == (4, 12)  # 8*9=2 is right


def test_tokens_of_several_characters_are_found_too():
    found = attempt("6+3=8*9=2-4=8A8", tokens=["6+", "3=8", "*9=", "2-4", "=8A8", END])
    assert (found.first_wrong, found.results, found.num_tokens) == (1, (1, 3, 4), 5)


def test_every_token_is_of_one_kind():
    response = f"6+3=8*9=2-4=8A8\n\n{P0}\n\n6+3=9"
    found = attempt(response)
    kinds = [found.kind(i) for i in range(len(split(response)))]
    assert kinds[4] == "wrong result" and kinds[8] == kinds[12] == "right result" and kinds[0] == "rest of the attempt"
    assert kinds[15] == "its end" and set(kinds[16:]) == {"later attempts"}


@pytest.mark.parametrize(("question", "text"), [("sums/1", "6+3*9-4="), ("chains/x", "What is 6+3*9-4?")])
def test_other_tasks_have_no_first_attempt(question, text):
    assert first_wrong.first_attempt(question, text, "6+3=8", list("6+3=8")) is None


def row(rng, response, reward, largest):
    """A response whose KL is 1, but 2 at token 4 and 3 at the `largest`, and whose surprise is largest at token 4."""
    tokens = split(response)
    return {
        **token_kl_row(rng, tokens, reward),
        "question": f"chains/{QUESTION}",
        "text": QUESTION,
        "response": response,
        "kl": [3.0 if i == largest else 2.0 if i == 4 else 1.0 for i in range(len(tokens))],
        "student_logprob": [-5.0 if i == 4 else -0.1 for i in range(len(tokens))],
    }


@pytest.fixture
def frame():
    rng = random.Random(0)
    wrong = "6+3=8*9=2-4=8A8"
    return pd.DataFrame(
        [
            row(rng, wrong, 0, 4),  # hit
            row(rng, wrong, 0, 15),  # a hit in the attempt; largest of all is its end
            row(rng, f"{wrong}\n\n{P0}\n\n{wrong}", 0, 20),  # a hit in the attempt; largest of all in a later one
            row(rng, "6+3=9*9=1-4=5A5", 0, 0),  # a miss
            row(rng, "6+3=9*9=1-4=7", 0, 13),  # wrong only in that it ends early: no attempt to point into
            row(rng, "6+3=9*9=1-4=7A7", 0, 3),  # wrong reward, right first attempt: not counted
            row(rng, wrong, 1, 4),  # not wrong
        ]
    )


def test_hits_count_the_first_attempts_largest_against_chance(frame):
    hits = first_wrong.hits(frame).set_index("signal")
    assert hits["responses"].tolist() == [4, 4, 4]
    assert hits.loc["KL", ["hit", "hit_anywhere"]].tolist() == [0.75, 0.25]
    assert hits.loc["student's surprise", "hit"] == 0.75  # its largest is token 4; the last one errs at token 12
    assert hits.loc["KL", "chance"] == pytest.approx(1 / 15)
    assert hits.loc["KL", "chance_result"] == pytest.approx(1 / 3)
    assert hits.loc["KL", "hit_se"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)


def test_kl_by_kind(frame):
    kinds = first_wrong.by_kind(frame).set_index("kind")
    assert kinds.index.tolist() == list(first_wrong.KINDS)
    assert kinds.loc["wrong result", "kl"] == pytest.approx((3 + 2 + 2 + 1) / 4)
    assert kinds.loc["wrong result", "tokens"] == 4
    assert kinds.loc["right result", "kl"] == pytest.approx((1 + 1 + 1 + (2 + 1) / 2 + (2 + 1 + 1) / 3) / 5)
    assert kinds.loc["its end", "kl"] == pytest.approx((1 + 3 + 1 + 1 + 3) / 5)
    assert kinds["holds_largest"].tolist() == [0.2, 0, 0.2, 0.4, 0.2]


def test_the_frame_gets_a_column(frame):
    places = first_wrong.with_first_wrong(frame)["first_wrong"].tolist()
    assert places == [4, 4, 4, 12, 13, None, 4]


def test_without_wrong_responses_tables_are_empty(frame):
    for without in (frame[frame["reward"] == 1], frame.assign(question="other/1"), pd.DataFrame()):
        assert len(first_wrong.hits(without)) == len(first_wrong.by_kind(without)) == 0
        assert len(first_wrong.with_first_wrong(without)) == len(without)
