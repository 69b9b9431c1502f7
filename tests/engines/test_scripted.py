"""Ends and errors of ScriptedEngine; the contract covers the rest."""

from __future__ import annotations

import pytest

from sdzero.engines import ScriptedEngine
from sdzero.engines.base import EngineSpec
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Sampling
from support.tiny_model import tiny_tokenizer


def started(engine: ScriptedEngine) -> ScriptedEngine:
    engine.start(EngineSpec("nowhere", 500, load_weights=True), PromptBuilder(tiny_tokenizer()))
    return engine


def test_a_response_ends_at_its_first_end_token() -> None:
    engine = started(ScriptedEngine({"a": "yes<|im_end|>no"}))
    [rollout] = engine.generate([Prompt(Question("a", "", ""), (5,))], Sampling(max_new_tokens=9), 0, 0)
    assert rollout.text == "yes" and rollout.finish_reason == "stop"


def test_a_question_without_a_response_is_an_error() -> None:
    engine = started(ScriptedEngine({"a": "yes"}))
    with pytest.raises(ValueError, match="no entry for question 'b'"):
        engine.generate([Prompt(Question("b", "", ""), (5,))], Sampling(max_new_tokens=5), 0, 0)
