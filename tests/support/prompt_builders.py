"""Three tokenizers with chat templates, a question and its responses, for tests of token sequences.

golden/smollm2.jinja is the chat template of SmolLM2-135M-Instruct (Apache-2.0), and golden/smollm2_tokenizer.json its
tokenizer cut down to the bytes, the special tokens and the merges that the golden texts need: their ids are the real
model's. golden/qwen3.jinja behaves like Qwen3's template for single turns.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdzero.methods import Context, Demonstration, Feedback, FinalAnswer, Plain, Revision
from sdzero.prompts import ControlPhrases, PromptBuilder
from sdzero.types import Question, Rollout, ScoredRollout, TokenIds, Verdict

QUESTION = Question("q1", "What is 17 + 25?", "42", {"solution": "10 + 20 = 30 and 7 + 5 = 12, so \\boxed{42}."})
WRONG = "17 + 25 = 32, because 7 + 5 = 12. The answer is \\boxed{32}."
RIGHT = "7 + 5 = 12, carry the 1: 17 + 25 = 42. The answer is \\boxed{42}."
SYSTEM = "Reason step by step."
CONTEXTS: list[Context] = [Plain(), Revision(), Demonstration(), FinalAnswer(), Feedback()]
GOLDEN = Path(__file__).parents[1] / "golden"
IM_START, IM_END, ENDOFTEXT = 151644, 151645, 151643  # of Qwen3


def smollm2(**kwargs: Any) -> PromptBuilder:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "smollm2_tokenizer.json"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=(GOLDEN / "smollm2.jinja").read_text(),
    )
    return PromptBuilder(tokenizer, **kwargs)


def qwen3_folder(folder: Path, eos: int | tuple[int, ...] | None = (IM_END, ENDOFTEXT)) -> Path:
    """A model folder with the special tokens and end-of-turn ids of Qwen3 and the bytes of the tokenizer above."""
    spec = json.loads((GOLDEN / "smollm2_tokenizer.json").read_text())
    special = {"<|endoftext|>": ENDOFTEXT, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
    special |= {"<think>": 151667, "</think>": 151668}
    spec["model"]["vocab"] |= special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [
        {"id": id, "content": content, "special": "think" not in content, **flags} for content, id in special.items()
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text((GOLDEN / "qwen3.jinja").read_text())
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


def qwen3(**kwargs: Any) -> PromptBuilder:
    with TemporaryDirectory() as folder:
        return PromptBuilder.from_pretrained(qwen3_folder(Path(folder)), **kwargs)


def word_level(**kwargs: Any) -> PromptBuilder:
    """One token per word, digit, sign or white space character."""
    texts = [QUESTION.text, WRONG, RIGHT, SYSTEM, *QUESTION.meta.values(), *ControlPhrases().__dict__.values()]
    texts += [context.template for context in CONTEXTS if isinstance(context, Demonstration | FinalAnswer | Feedback)]
    pieces = pre_tokenizers.Split(Regex(r"[A-Za-z]+|[^A-Za-z]"), "isolated")
    words = {word for text in texts for word, _ in pieces.pre_tokenize_str(text)}
    words |= {*"answer", *"()", "wrong", "read", "attempt", "was", "Q", "A"}
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", *sorted(words)])}, "<unk>")
    )
    core.pre_tokenizer, core.decoder = pieces, decoders.Fuse()
    template = "{% for m in messages %}{{ 'Q ' if m.role == 'user' }}{{ m.content + '\n' }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template + "{{ 'A ' if add_generation_prompt }}",
    )
    return PromptBuilder(tokenizer, **kwargs)


BUILDERS = {"smollm2": smollm2, "qwen3": qwen3, "word_level": word_level}


def sampled(builder: PromptBuilder, text: str) -> TokenIds:
    """Ids a model may sample for a text, though no tokenizer would write them: " answer" letter by letter."""
    encode = lambda part: builder.tokenizer.encode(part, add_special_tokens=False)  # noqa: E731
    head, tail = text.split(" answer")
    return tuple([*encode(head), *(i for letter in " answer" for i in encode(letter)), *encode(tail)])


def scored(builder: PromptBuilder, ids: TokenIds, reward: int, text: str = "", parsed: str | None = None):
    rollout = Rollout(builder.prompt(QUESTION), ids, (0.0,) * len(ids), text, "stop", 0)
    return ScoredRollout(rollout, Verdict(1 if reward else 0, "correct" if reward else "wrong", parsed))
