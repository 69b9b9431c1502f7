"""Verifiable instructions (IFEval, IFBench), checked by the verifiers of the package if-verifiable.

Run it in a killable worker: the verifiers search model text with regular expressions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

Benchmark = Literal["ifeval", "ifbench"]
NLTK_DATA = ("punkt", "punkt_tab", "averaged_perceptron_tagger_eng", "stopwords")


@dataclass(frozen=True)
class Item:
    """A response and the instructions of its question; `response` None tests whether the question is verifiable."""

    benchmark: Benchmark
    prompt: str
    instruction_ids: tuple[str, ...]
    kwargs: tuple[dict[str, Any], ...]
    loose: bool
    response: str | None


@dataclass(frozen=True)
class Followed:
    """Instructions that a response did not follow, or the `problem` that prevents checking."""

    missed: tuple[str, ...] = ()
    problem: str = ""


WARM_UP = (Item("ifeval", "", ("punctuation:no_comma",), ({},), False, "warm"), Followed())


def work(item: Item) -> Followed:
    """Check one response against every instruction of its question.

    Raises:
        RuntimeError: NLTK's data is missing; names the command that installs it.
    """
    registry = _registry(item.benchmark)
    if unknown := [id for id in item.instruction_ids if id not in registry]:
        return Followed(problem=f"{item.benchmark} has no instruction {unknown[0]!r}")
    if not item.instruction_ids:
        return Followed(problem="it has no instructions")
    if len(item.kwargs) != len(item.instruction_ids):
        return Followed(problem=f"{len(item.instruction_ids)} instructions, but kwargs for {len(item.kwargs)}")
    from if_verifiable.common import evaluate_instructions

    random.seed(0)  # verifiers sample parameters that the question leaves open
    kwargs = [dict(row) for row in item.kwargs]
    response = "A sentence. Another one." if item.response is None else item.response
    try:
        results, _ = evaluate_instructions(response, [*item.instruction_ids], kwargs, item.prompt, registry)
    except LookupError as error:
        if "nltk" not in str(error).lower():
            raise
        remedy = f"python -m nltk.downloader {' '.join(NLTK_DATA)}"
        raise RuntimeError(f"the verifiers need NLTK data that is not installed: {remedy}") from error
    if len(results) != len(item.instruction_ids):  # a blank response
        return Followed(item.instruction_ids)
    return Followed(tuple(r.instruction_id for r in results if not (r.loose_pass if item.loose else r.strict_pass)))


def _registry(benchmark: Benchmark) -> dict[str, Any]:
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    nltk.download = lambda *_, **__: False  # IFBench's verifiers would load data from the network when imported
    if benchmark == "ifeval":
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    else:
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT
    return INSTRUCTION_DICT
