"""Shared by the benchmarks of whole optimizer steps: sizes, models, stored responses, comparison of sides."""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from loops import MAX_GRAD_NORM, OPTIMIZER, Side
from measure import Row, compare, one_thread, parser, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from sdzero.prompts import ControlPhrases, PromptBuilder
from sdzero.types import Prompt, Question, Rollout, ScoredRollout, TokenIds, Verdict

SHAPE: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
MODEL: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # peaked next-token distributions, so that losses differ
}
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<unk>"]


@dataclass(frozen=True)
class Case:
    """Sizes of one step.

    Args:
        name: as in the table.
        vocab: size of the vocabulary.
        lengths: tokens of each stored response (of y_init and of y_revised in phase 1).
        max_tokens: ours: `max_tokens_per_micro_batch`.
        rows: TRL: sequences of a micro batch, a divisor of their number. Like `max_tokens` the fastest one tried on
            one core, where padding costs most and larger products gain little.
        flat_rows: TRL: the same for padding-free batches.
        packed_length: TRL: tokens of a packed row.
        shape: the model's configuration.
    """

    name: str
    vocab: int
    lengths: tuple[int, ...]
    max_tokens: int
    rows: int = 1
    flat_rows: int = 2
    packed_length: int = 1024
    shape: Mapping[str, Any] | None = None


SidesOf = Callable[[Case, Path, bool], tuple[dict[str, Side], int]]


def spread(num: int, low: int, high: int, skew: float = 1.0) -> tuple[int, ...]:
    """`num` lengths from `low` to `high`, shuffled: evenly, or with `skew` above 1 most of them near `low`."""
    shares = [(i / max(num - 1, 1)) ** skew for i in range(num)]
    lengths = [round(low + (high - low) * share) for share in shares]
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


def write_model(folder: Path, case: Case) -> None:
    """Write a model of random weights and a tokenizer of whole words, so that peers read the same ids from text."""
    phrases = ControlPhrases()
    known = [*SPECIAL, *sorted({*phrases.correct.split(), *phrases.incorrect.split()})]
    words = [*known, *(f"w{i}" for i in range(case.vocab - len(known)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template="{% for m in messages %}{{ m.content }} {% endfor %}",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=case.vocab,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        dtype="float32",
        **{**MODEL, **(case.shape or SHAPE)},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def stored_responses(builder: PromptBuilder, case: Case) -> list[ScoredRollout]:
    """Random responses to random prompts, one for each length; every second one has reward 1."""
    rng = random.Random(1)
    lowest = len(SPECIAL)

    def ids(num: int) -> TokenIds:
        return tuple(rng.randrange(lowest, case.vocab) for _ in range(num))

    scored = []
    for i, length in enumerate(case.lengths):
        prompt = Prompt(Question(f"stored/{i}", "", ""), ids(rng.randint(20, 40)))
        rollout = Rollout(prompt, (*ids(length - 1), builder.end_id), (0.0,) * length, "", "stop", 0)
        scored.append(ScoredRollout(rollout, Verdict(1, "correct") if i % 2 else Verdict(0, "wrong")))
    return scored


def as_text(builder: PromptBuilder, ids: Sequence[int]) -> str:
    return " ".join(builder.tokenizer.convert_ids_to_tokens(list(ids)))


def quiet() -> None:
    """Silence libraries, so that only the table is printed."""
    warnings.simplefilter("ignore")
    set_verbosity_error()
    disable_progress_bar()
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def _options(about: str) -> argparse.Namespace:
    options = parser(about, rounds=3)
    options.add_argument("--case", help="run only the case of this name")
    options.add_argument("--max-tokens", type=int, help="ours: tokens of a micro batch (default: tuned for a CPU)")
    options.add_argument("--rows", type=int, help="TRL: sequences of a micro batch (default: tuned for a CPU)")
    return options.parse_args()


def run_case(case: Case, sides_of: SidesOf, alike: Sequence[set[str]], rounds: int, with_trl: bool) -> list[Row]:
    """Measure the sides of one case; ratios are to the first.

    Args:
        sides_of: (case, model folder, TRL is installed) -> the sides, and the tokens of one step.
        alike: sides with the same loss, whose first losses must agree.
    """
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_model(folder, case)
        sides, num_tokens = sides_of(case, folder, with_trl)
        for side in sides.values():
            stack.callback(side.close)
        rows = compare(case.name, sides, next(iter(sides)), rounds, work=num_tokens)
        for row in rows:
            row.metrics["first_loss"] = sides[row.side].first_loss or math.nan
        tolerance = 0.05 if torch.cuda.is_available() else 1e-3  # bfloat16 there
        for names in alike:
            losses = {row.side: row.metrics["first_loss"] for row in rows if row.side in names}
            if losses and max(losses.values()) > min(losses.values()) * (1 + tolerance):
                raise RuntimeError(f"{case.name}: losses that should be the same differ: {losses}")
    return rows


def main(
    name: str, about: str, cases: Sequence[Case], small: Case, sides_of: SidesOf, alike: Sequence[set[str]]
) -> None:
    """Command line of both benchmarks."""
    args = _options(about)
    quiet()
    one_thread()
    with_trl = find_spec("trl") is not None
    if not with_trl:
        print("trl is not installed: its sides are left out")
    cases = [small] if args.small else [case for case in cases if args.case in (None, case.name)]
    tuned = {name: value for name, value in (("max_tokens", args.max_tokens), ("rows", args.rows)) if value}
    cases = [replace(case, **tuned) for case in cases]
    rows = [row for case in cases for row in run_case(case, sides_of, alike, args.rounds, with_trl)]
    settings = {
        "rounds": args.rounds,
        "optimizer": f"AdamW, {OPTIMIZER}, gradients clipped to {MAX_GRAD_NORM}",
        "precision": "bfloat16 computation, float32 weights" if torch.cuda.is_available() else "float32",
        "model": {**MODEL, **SHAPE},
        "cases": [asdict(case) for case in cases],
    }
    write(name, about, settings, rows, args)
