from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from sdzero.prompts import ControlPhrases, PromptBuilder
from sdzero.tasks import Chains
from sdzero.tasks.chains import apply
from sdzero.tasks.chains_corpus import COPY, NoisyFacts, corpus
from sdzero.tasks.splits import split_of

TINY = Path(__file__).parents[2] / "configs/tiny_model"
PHRASES = ControlPhrases()
BUILDER = PromptBuilder.from_pretrained(TINY)
TOKENIZER = BUILDER.tokenizer


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    return [(question.text, document) for question, document in corpus(12_000, seed=5)]


def steps_of(attempt: str) -> list[tuple[tuple[int, str, int], int]]:
    """Return ((value before, operator, operand), written result) of every step."""
    first = int(attempt[0])
    found = []
    for operator, operand, result in re.findall(r"([+*-])(\d)=(\d)", attempt):
        found.append(((first, operator, int(operand)), int(result)))
        first = int(result)
    return found


def attempts_of(document: str) -> tuple[list[str], list[int]]:
    """Return the attempts of a document, and the reward of each phrase between them."""
    parts = document.split("\n\n")
    return parts[::2], [[PHRASES[0], PHRASES[1]].index(phrase) for phrase in parts[1::2]]


def test_same_seed_same_corpus_and_no_eval_question(documents: list[tuple[str, str]]) -> None:
    assert [(question.text, document) for question, document in corpus(50, seed=5)] == documents[:50]
    assert [document for _, document in corpus(50, seed=6)] != [document for _, document in documents[:50]]
    asked = {question for question, _ in documents}
    assert all(split_of(question) != "eval" for question in asked)
    assert not asked & {question.text for question in Chains().questions("eval", 2000)}


def test_attempts_answer_the_question_and_are_joined_as_described(documents: list[tuple[str, str]]) -> None:
    counts: Counter[int] = Counter()
    phrases: Counter[int] = Counter()
    for question, document in documents:
        attempts, rewards = attempts_of(document)
        counts[len(attempts)] += 1
        phrases.update(rewards)
        for attempt in attempts:
            assert re.sub(r"=\d|A\d$", "", attempt) + "=" == question
            assert attempt[-1] == attempt[-3]
    assert set(counts) == {1, 2, 3, 4}
    assert counts[1] / len(documents) == pytest.approx(0.82, abs=0.015)
    assert [counts[n] / len(documents) for n in (2, 3, 4)] == pytest.approx([0.06] * 3, abs=0.01)
    assert phrases[0] / phrases.total() == pytest.approx(0.5, abs=0.03)


def test_error_rates_of_the_facts(documents: list[tuple[str, str]]) -> None:
    facts = NoisyFacts(seed=5)
    assert Counter(facts.error_rate.values()) == {0.04: 225, 0.25: 45, 0.60: 30}
    written: dict[float, Counter[str]] = defaultdict(Counter)
    for _, document in documents:
        for fact, result in steps_of(attempts_of(document)[0][0]):
            kind = "right" if result == apply(*fact) else "habit" if result == facts.habit[fact] else "other"
            written[facts.error_rate[fact]][kind] += 1
    for rate, kinds in written.items():
        wrong = kinds["habit"] + kinds["other"]
        assert wrong / kinds.total() == pytest.approx(rate, abs=0.02)
        assert kinds["habit"] / wrong == pytest.approx(0.8, abs=0.04)


def test_copy_rates_after_each_phrase(documents: list[tuple[str, str]]) -> None:
    """A repeated wrong result is a copy, or by chance the same error: p + (1 - p) * P(this error)."""
    assert COPY == {0: 0.5, 1: 0.95}
    facts = NoisyFacts(seed=5)
    seen: dict[int, list[float]] = {0: [], 1: []}
    expected: dict[int, list[float]] = {0: [], 1: []}
    for _, document in documents:
        attempts, rewards = attempts_of(document)
        for before, after, reward in zip(attempts, attempts[1:], rewards, strict=False):
            for (fact, result), (again, repeated) in zip(steps_of(before), steps_of(after), strict=True):
                if fact == again and result == facts.habit[fact]:
                    chance = 0.8 * facts.error_rate[fact]
                    seen[reward].append(result == repeated)
                    expected[reward].append(COPY[reward] + (1 - COPY[reward]) * chance)
    for reward in (0, 1):
        assert len(seen[reward]) > 400
        assert sum(seen[reward]) / len(seen[reward]) == pytest.approx(
            sum(expected[reward]) / len(expected[reward]), abs=0.04
        )


def test_a_document_holds_the_bridges_of_the_builder(documents: list[tuple[str, str]]) -> None:
    """Pre-training and collection put the same token ids between two attempts."""
    encode = TOKENIZER.encode
    joined = [document for _, document in documents[:300] if "\n\n" in document]
    assert joined
    for document in joined:
        attempts, rewards = attempts_of(document)
        ids = encode(attempts[0])
        for attempt, reward in zip(attempts[1:], rewards, strict=True):
            ids += [*BUILDER.bridge(reward), *encode(attempt)]
        assert encode(document) == ids


def test_phrases_and_documents_are_fully_encodable(documents: list[tuple[str, str]]) -> None:
    assert [len(BUILDER.bridge(r)) for r in (0, 1)] == [15, 9]
    for question, document in documents[:200]:
        ids = TOKENIZER.encode(question + document)
        assert TOKENIZER.unk_token_id not in ids and TOKENIZER.decode(ids) == question + document


def test_the_chat_template_costs_one_token() -> None:
    ids = (*TOKENIZER.encode("6+3*9-4="), TOKENIZER.convert_tokens_to_ids("<|assistant|>"))
    assert BUILDER.chat("6+3*9-4=") == ids
    assert BUILDER.end_ids == {TOKENIZER.eos_token_id}


@given(st.lists(st.integers(4, 36), max_size=40))
def test_decoding_is_inverted_by_encoding(ids: list[int]) -> None:
    """Holds for every sequence the model can sample."""
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids


def test_the_config_fits_the_tokenizer() -> None:
    config = AutoConfig.from_pretrained(TINY)
    assert config.vocab_size == len(TOKENIZER) == 37
    assert (config.eos_token_id, config.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
