from __future__ import annotations

import pytest
import torch

from sdzero.engines import ScriptedEngine
from sdzero.engines.base import EngineSpec
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Sampling
from support.tiny_model import tiny_tokenizer


def started(engine: ScriptedEngine) -> ScriptedEngine:
    engine.start(EngineSpec("nowhere", 500, load_weights=True), PromptBuilder(tiny_tokenizer()))
    return engine


def test_says_its_line_and_ends_the_turn() -> None:
    engine = started(ScriptedEngine({"a": "the answer is 42"}))
    [rollout] = engine.generate([Prompt(Question("a", "", ""), (5,))], Sampling(max_new_tokens=99), 0, 0)
    assert rollout.text == "the answer is 42" and rollout.finish_reason == "stop"
    assert set(rollout.logprobs) == {0.0} and len(rollout.logprobs) == len(rollout.token_ids)


def test_a_line_longer_than_the_limit_is_cut() -> None:
    engine = started(ScriptedEngine(lambda prompt, seed: "x" * (seed + len(prompt.token_ids))))
    prompt = Prompt(Question("a", "", ""), (5, 6))
    [fits] = engine.generate([prompt], Sampling(max_new_tokens=5), 2, 0)
    [cut] = engine.generate([prompt], Sampling(max_new_tokens=5), 3, 0)
    assert (fits.text, fits.finish_reason) == ("xxxx", "stop")
    assert (cut.text, cut.finish_reason) == ("xxxxx", "length")


def test_a_line_ends_where_the_turn_does() -> None:
    engine = started(ScriptedEngine({"a": "yes<|im_end|>no"}))
    [rollout] = engine.generate([Prompt(Question("a", "", ""), (5,))], Sampling(max_new_tokens=9), 0, 0)
    assert rollout.text == "yes" and rollout.finish_reason == "stop"


def test_counts_what_is_asked_of_it_and_consumes_the_weights() -> None:
    engine = started(ScriptedEngine({}))
    weights = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    engine.sync(weights, 4)
    assert next(weights, None) is None
    engine.generate([], Sampling(max_new_tokens=5), 0, 4)
    assert (engine.num_syncs, engine.num_generate_calls, engine.policy_version) == (1, 1, 4)


def test_a_question_without_a_line_is_an_error() -> None:
    engine = started(ScriptedEngine({"a": "yes"}))
    with pytest.raises(ValueError, match="no entry for question 'b'"):
        engine.generate([Prompt(Question("b", "", ""), (5,))], Sampling(max_new_tokens=5), 0, 0)
