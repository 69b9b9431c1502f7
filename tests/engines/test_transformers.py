"""How TransformersEngine splits a call into batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sdzero.engines import TransformersEngine
from sdzero.engines.base import EngineSpec
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Sampling


def of_lengths(lengths: Iterable[int]) -> list[Prompt]:
    return [Prompt(Question(f"q{i}", "", ""), tuple(5 + (i + j) % 60 for j in range(n))) for i, n in enumerate(lengths)]


def num_padded(batches: Iterable[Sequence[int]], lengths: Sequence[int]) -> int:
    return sum(max(lengths[place] for place in batch) - lengths[place] for batch in batches for place in batch)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 12))
def test_batches_hold_every_prompt_once_and_full_ones_pad_least(lengths: list[int], size: int) -> None:
    batches = TransformersEngine(size)._batches(of_lengths(lengths))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) for batch in batches), "in the order of the prompts within a batch"
    assert all(len(batch) == size for batch in batches[:-1]) and (not batches or 1 <= len(batches[-1]) <= size)
    spans = [(max(lengths[p] for p in batch), min(lengths[p] for p in batch)) for batch in batches]
    assert all(shortest >= longest for (_, shortest), (longest, _) in pairwise(spans))
    whole = lengths[: len(lengths) // size * size]  # a last batch that is not full may be worth more elsewhere
    as_given = [range(len(whole))[i : i + size] for i in range(0, len(whole), size)]
    assert num_padded(TransformersEngine(size)._batches(of_lengths(whole)), whole) <= num_padded(as_given, whole)


def test_lengths_that_alternate_are_not_padded_to_each_other() -> None:
    lengths = [10, 200] * 8
    as_given = [range(16)[i : i + 4] for i in range(0, 16, 4)]
    assert num_padded(as_given, lengths) == 8 * 190
    assert num_padded(TransformersEngine(4)._batches(of_lengths(lengths)), lengths) == 0


def test_sorted_batches_answer_in_the_order_of_the_prompts(builder: PromptBuilder) -> None:
    """Greedy, so that a prompt determines its response; sampled, a seed does."""
    prompts = of_lengths([3, 40, 7, 22, 5, 60, 12, 9, 33, 4, 18])
    engine = TransformersEngine(max_batch_size=3)
    engine.start(EngineSpec(builder.tokenizer.name_or_path, 80, load_weights=True), builder)
    together = engine.generate(prompts, Sampling(0.0, 1.0, 8), 0, 0)
    assert [rollout.prompt for rollout in together] == prompts
    alone = [engine.generate([prompt], Sampling(0.0, 1.0, 8), 0, 0)[0] for prompt in prompts]
    assert [rollout.token_ids for rollout in together] == [rollout.token_ids for rollout in alone]
    sampled = engine.generate(prompts, Sampling(1.0, 1.0, 8), 7, 0)
    assert engine.generate(prompts, Sampling(1.0, 1.0, 8), 7, 0) == sampled
