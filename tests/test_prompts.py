"""Golden token sequences of three chat templates, and what must hold for every response.

After a wanted change, `PYTHONPATH=tests python tests/test_prompts.py` writes the golden files anew: read their diff.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from sdzero.methods import Plain, Revision
from sdzero.methods.batching import collate
from sdzero.prompts import ControlPhrases, PromptBuilder
from sdzero.types import TokenIds
from support.prompt_builders import (
    BUILDERS,
    CONTEXTS,
    ENDOFTEXT,
    GOLDEN,
    IM_END,
    IM_START,
    QUESTION,
    RIGHT,
    SYSTEM,
    WRONG,
    qwen3,
    qwen3_folder,
    sampled,
    scored,
    smollm2,
    word_level,
)


def sequences(builder: PromptBuilder) -> dict[str, list[TokenIds]]:
    """Every sequence of the module's docstring, as [context, target] or alone."""
    end = min(builder.end_ids)  # Qwen's other one, where traces must end in the canonical one
    wrong = scored(builder, (*sampled(builder, WRONG), end), 0, WRONG, "32")
    right = scored(builder, (*sampled(builder, RIGHT), end), 1, RIGHT, "42")
    prompt = builder.prompt(QUESTION).token_ids
    found = {"prompt": [prompt], "body": [builder.body(wrong.rollout.token_ids)]}
    found |= {f"bridge r={r}": [builder.bridge(r)] for r in (0, 1)}
    for name, first in (("r=0", wrong), ("r=1", right)):
        found[f"collect {name}"] = [builder.revision_prompt(first).token_ids]
        trace = builder.trace(first, right.rollout.token_ids)
        prefix = trace.prompt_ids + trace.init_ids + trace.bridge_ids
        found[f"L_revision {name}"] = [prefix, trace.revised_ids]
        found[f"L_generation {name}"] = [trace.prompt_ids, trace.init_ids + trace.bridge_ids + trace.revised_ids]
    trace = builder.demonstration(QUESTION, QUESTION.meta["solution"])
    found["L_generation demonstration"] = [trace.prompt_ids, trace.init_ids + trace.bridge_ids + trace.revised_ids]
    found["student"] = [prompt, wrong.rollout.token_ids]
    for context in CONTEXTS:
        read = context(builder, wrong, [wrong, right]).token_ids
        found[f"teacher {type(context).__name__}"] = [read, wrong.rollout.token_ids]
    return found


def golden(name: str) -> dict[str, Any]:
    """Content of golden/<name>.json: per sequence its ids and their text, part by part."""
    make = BUILDERS[name]
    found = sequences(make()) | {"prompt with system": [make(system=SYSTEM).chat(QUESTION.text)]}
    for thinking in (False, True):
        kwargs = {"chat_template_kwargs": {"enable_thinking": thinking}}
        found[f"prompt enable_thinking={thinking}"] = [make(**kwargs).chat(QUESTION.text)]
    decode = make().tokenizer.decode
    return {key: [[list(ids), decode(ids, skip_special_tokens=False)] for ids in parts] for key, parts in found.items()}


def write_golden_files() -> None:
    for name in BUILDERS:
        rows = [f"{json.dumps(key)}: {json.dumps(parts)}" for key, parts in golden(name).items()]
        (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


@pytest.fixture(scope="module", params=BUILDERS)
def builder(request) -> PromptBuilder:
    return BUILDERS[request.param]()


@pytest.mark.parametrize("name", BUILDERS)
def test_golden_sequences(name):
    assert golden(name) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_the_golden_sequences_are_the_formulas_of_the_method(builder):
    found = sequences(builder)
    (prompt,), (body,), bridges = found["prompt"], found["body"], [found[f"bridge r={r}"][0] for r in (0, 1)]
    end, y, revised = (builder.end_id,), found["student"][1], (*sampled(builder, RIGHT), builder.end_id)
    assert y == (*body, min(builder.end_ids))
    assert found["collect r=0"] == [prompt + body + bridges[0]]
    assert found["collect r=1"] == [prompt + sampled(builder, RIGHT) + bridges[1]]
    assert found["L_revision r=0"] == [prompt + body + bridges[0], revised]
    assert found["L_generation r=0"] == [prompt, body + bridges[0] + revised]
    assert found["student"] == [prompt, y]
    assert found["teacher Revision"] == [prompt + body + bridges[0], y]
    assert found["L_generation demonstration"][1] == builder._encode(QUESTION.meta["solution"]) + end
    for term in ("r=0", "r=1"):  # one row gives both terms
        assert sum(found[f"L_revision {term}"], ()) == sum(found[f"L_generation {term}"], ())


def test_y_is_not_what_its_text_would_encode_to(builder):
    """Else the golden files could not tell a builder that decodes and encodes again."""
    text = builder.tokenizer.decode(sampled(builder, WRONG))
    assert text == WRONG and builder._encode(text) != sampled(builder, WRONG)


@pytest.mark.parametrize(
    ("make", "rendered"),
    [
        (
            smollm2,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (qwen3, "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"),
        (word_level, "Q What is 17 + 25?\nA "),
    ],
)
def test_the_prompt_is_the_template_around_the_question(make, rendered):
    assert make().tokenizer.decode(make().prompt(QUESTION).token_ids) == rendered


def test_chat_template_kwargs_reach_the_template():
    plain, on, off = (
        qwen3(chat_template_kwargs=kwargs).chat("2")
        for kwargs in (None, {"enable_thinking": True}, {"enable_thinking": False})
    )
    decode = qwen3().tokenizer.decode
    assert plain == on and off[: len(on)] == on
    assert decode(off[len(on) :]) == "<think>\n\n</think>\n\n"


def test_chat_template_kwargs_and_system_message_reach_the_contexts():
    builder = qwen3(chat_template_kwargs={"enable_thinking": False}, system=SYSTEM)
    item = scored(builder, (5,), 0)
    for context in CONTEXTS:
        text = builder.tokenizer.decode(context(builder, item, [item]).token_ids)
        assert SYSTEM in text and "<think>\n\n</think>\n\n" in text


def test_a_system_message_replaces_the_default_one():
    text = smollm2().tokenizer.decode(smollm2(system=SYSTEM).chat("2"))
    assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>") and "SmolLM" not in text


def test_phrases_are_configurable():
    builder = smollm2(control_phrases=ControlPhrases(correct="So.", incorrect="No."))
    assert [builder.tokenizer.decode(builder.bridge(r)) for r in (0, 1)] == ["\n\nNo.\n\n", "\n\nSo.\n\n"]


@pytest.mark.parametrize(
    ("eos", "end_ids"),
    [
        ((IM_END, ENDOFTEXT), {IM_END, ENDOFTEXT}),
        (ENDOFTEXT, {IM_END, ENDOFTEXT}),
        (IM_END, {IM_END}),
        (None, {IM_END}),
    ],
)
def test_end_ids_are_the_tokenizers_and_the_generation_configs(tmp_path, eos, end_ids):
    builder = PromptBuilder.from_pretrained(qwen3_folder(tmp_path, eos))
    assert builder.end_ids == end_ids
    assert builder.end_id == IM_END and builder.pad_id == ENDOFTEXT


def test_a_tokenizer_that_starts_every_text_with_a_token_adds_none_of_them():
    """Llama's do: one before the control phrase, the solution or the rendered template would be one too many."""
    tokenizer = smollm2().tokenizer
    start = ("<|im_start|>", 1)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [start])
    assert tokenizer.encode("2")[0] == 1
    eager, plain = PromptBuilder(tokenizer), smollm2()
    assert [eager.bridge(r) for r in (0, 1)] == [plain.bridge(r) for r in (0, 1)]
    assert eager.demonstration(QUESTION, "2") == plain.demonstration(QUESTION, "2")


def test_without_a_pad_token_the_end_token_pads():
    tokenizer = smollm2().tokenizer
    tokenizer.pad_token = None
    assert PromptBuilder(tokenizer).pad_id == tokenizer.eos_token_id


def test_a_tokenizer_that_cannot_serve_is_refused():
    tokenizer = smollm2().tokenizer
    tokenizer.name_or_path, tokenizer.eos_token = "some/model", None
    with pytest.raises(ValueError, match=r"'some/model' has no eos_token"):
        PromptBuilder(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"'some/model' has no chat template: use .*or put a chat_template\.jinja"):
        PromptBuilder(tokenizer)


QWEN3 = qwen3()
IDS = st.integers(0, 200_000) | st.sampled_from([IM_END, ENDOFTEXT, IM_START])  # most have no text, few round-trip
RESPONSES = st.lists(IDS, max_size=12).map(tuple)


class Unused:
    """A tokenizer that must not be used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"tokenizer.{name} was used on a response")


NO_TOKENIZER = qwen3()
NO_TOKENIZER.tokenizer = Unused()


@given(RESPONSES)
def test_body_strips_end_ids_at_the_end_and_nothing_else(y):
    body = QWEN3.body(y)
    assert y[: len(body)] == body
    assert set(y[len(body) :]) <= {IM_END, ENDOFTEXT}
    assert not body or body[-1] not in (IM_END, ENDOFTEXT)
    assert QWEN3.body(list(y)) == body


@given(RESPONSES, RESPONSES, st.sampled_from([0, 1]))
def test_a_response_is_never_decoded_and_encoded_again(y, revised, reward):
    item = scored(QWEN3, y, reward)
    prompt, bridge = item.rollout.prompt.token_ids, NO_TOKENIZER.bridge(reward)
    prefix = prompt + NO_TOKENIZER.body(y) + bridge
    assert NO_TOKENIZER.revision_prompt(item).token_ids == prefix
    assert NO_TOKENIZER.revision_prompt(item).question is QUESTION
    trace = NO_TOKENIZER.trace(item, revised)
    assert trace.prompt_ids + trace.init_ids + trace.bridge_ids == prefix
    assert trace.revised_ids == (*NO_TOKENIZER.body(revised), IM_END)
    assert (trace.prompt_ids, trace.init_ids, trace.bridge_ids) == (prompt, NO_TOKENIZER.body(y), bridge)
    assert (trace.question, trace.reward) == (QUESTION, reward)
    assert Plain()(NO_TOKENIZER, item, [item]).token_ids == prompt
    assert Revision()(NO_TOKENIZER, item, [item]).token_ids == prefix


@given(st.lists(RESPONSES.filter(bool), min_size=1, max_size=4), st.sampled_from([0, 1]))
def test_student_and_teacher_score_the_same_copy_of_y(responses, reward):
    items = [scored(QWEN3, y, reward) for y in responses]
    student = collate([i.rollout.prompt.token_ids for i in items], responses, QWEN3.pad_id)
    for context in CONTEXTS:
        reads = [context(QWEN3, item, items).token_ids for item in items]
        teacher = collate(reads, responses, QWEN3.pad_id)
        assert torch.equal(student.targets, teacher.targets)
        assert student.targets.tolist() == [token for y in responses for token in y]


@given(RESPONSES, st.sampled_from([0, 1]))
def test_a_context_adds_no_more_than_its_bound(y, reward):
    item = scored(QWEN3, y, reward)
    added = len(Revision()(QWEN3, item, [item]).token_ids) - len(item.rollout.prompt.token_ids)
    assert added <= Revision().max_extra_tokens(QWEN3, len(y))
    assert Plain().max_extra_tokens(QWEN3, len(y)) == 0


@given(RESPONSES, RESPONSES)
def test_the_two_srt_terms_share_one_row(y, revised):
    """Every target of L_revision is the same position, token and prefix as in L_generation."""
    trace = QWEN3.trace(scored(QWEN3, y, 0), revised)
    prefix = trace.prompt_ids + trace.init_ids + trace.bridge_ids
    revision = collate([prefix], [trace.revised_ids], 0)
    generation = collate([trace.prompt_ids], [trace.init_ids + trace.bridge_ids + trace.revised_ids], 0)
    assert torch.equal(revision.input_ids, generation.input_ids)
    assert not (revision.predicts & ~generation.predicts).any()
    assert torch.equal(generation.targets[-len(revision.targets) :], revision.targets)


if __name__ == "__main__":
    write_golden_files()
