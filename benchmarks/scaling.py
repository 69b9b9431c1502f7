"""Growth of time and memory with response length, batch and vocabulary: the divergence head and a whole step.

    python benchmarks/scaling.py [--rounds 3] [--small]

Head: tokens from 256 to 8,192 and vocabularies from 4,096 to 151,936, with the whole vocabulary's products as floor.
Step: one optimizer step of SelfDistill on responses of equal length, with growing number or length; attention makes
it superlinear in length. `first` is the option `teacher_first`: the teacher's pass over all micro batches comes first.
Prints a table and writes results/scaling.json.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import heads
import loops
import measure
import stored
import torch

from sdzero.losses import Divergence
from sdzero.methods import SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.types import RolloutBatch

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
VOCABS = (4096, 32_768, 151_936)
BATCHES = (1, 2, 4, 8, 16)


def head_rows(num_tokens: int, vocab: int, hidden_size: int, rounds: int) -> list[measure.Row]:
    case = heads.Case(num_tokens, hidden_size, vocab)
    sides = {
        "floor": heads.floor(case, with_teacher=True),
        "ours": heads.ours_kl(case, Divergence()),
        "naive": heads.naive_kl(case),
    }
    return measure.compare(f"head {case.name}", sides, "floor", rounds, work=num_tokens)


def step_rows(num: int, length: int, case: stored.Case, rounds: int, max_tokens: int) -> list[measure.Row]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        stored.write_model(folder, case)
        scored = stored.stored_responses(ModelConfig(name).builder(), case)

        def side(teacher_first: bool) -> loops.Side:
            def make() -> SelfDistill:
                return SelfDistill(
                    ModelConfig(name),
                    optimizer=loops.adamw,
                    max_tokens_per_micro_batch=max_tokens,
                    teacher_first=teacher_first,
                )

            return loops.ours(make, lambda _, step: RolloutBatch(scored, step, step), 2 * num * length)

        sides = {"interleaved": side(False), "first": side(True)}
        try:
            return measure.compare(f"step {num} x {length:,}", sides, "interleaved", rounds, work=num * length)
        finally:
            for one in sides.values():
                one.close()


def main() -> None:
    given = measure.parser(__doc__, rounds=3).parse_args()
    stored.quiet()
    measure.one_thread()
    lengths, vocabs, batches = (LENGTHS, VOCABS, BATCHES) if not given.small else ((8, 16), (64,), (1, 2))
    hidden_size, vocab, max_tokens = (16, 256, 64) if given.small else (256, 8192, 2048)
    shape = stored.TINY if given.small else stored.SHAPE
    rows = [row for n in lengths for row in head_rows(n, vocab, hidden_size, given.rounds)]
    rows += [row for v in vocabs for row in head_rows(lengths[1], v, hidden_size, given.rounds) if v != vocab]
    sizes = [*((1, length) for length in lengths), *((num, lengths[0]) for num in batches)]
    for num, length in dict.fromkeys(sizes):
        case = stored.Case("step", 256 if given.small else 4096, (length,) * num, max_tokens, shape=shape)
        rows += step_rows(num, length, case, given.rounds, max_tokens)
    settings = {"rounds": given.rounds, "hidden_size": hidden_size, "max_tokens_per_micro_batch": max_tokens}
    about = "Time and memory against response length, batch and vocabulary"
    measure.write("scaling", about, settings, rows, given)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
