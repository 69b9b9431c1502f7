"""One optimizer step of self-revision training on the same traces: ours, TRL's SFTTrainer, and a plain loop.

    python benchmarks/srt_step.py [--small] [--rounds N] [--case NAME]

Every side computes both terms: the revision's loss on y_revised after x + y_init + P_r, and the generation's on
y_init + P_r + y_revised after x. Ours needs one pass over one sequence, the others two rows per trace. The rate counts
a trace's target tokens, y_init + P_r + y_revised, once. About six minutes on one core.

`sdzero` and `plain` divide each term by its own tokens and their first losses must agree; SFTTrainer divides both by
all. Its variants: `padded`, micro batches of similar lengths; `padding-free`, a micro batch as one sequence; `packed`,
rows of up to `max_length` tokens filled best-fit. Their first losses must agree too, so no sequence sees another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loops
import stored
import torch
from loops import Side
from stored import Case, spread
from torch import nn
from torch.nn.functional import cross_entropy

from sdzero.methods import SRT
from sdzero.models.language_model import ModelConfig
from sdzero.types import TokenIds, Trace, TraceBatch

CASES = (
    Case("even, V=4,096", 4096, spread(6, 100, 413), max_tokens=1024, rows=2),
    Case("skewed, V=4,096", 4096, spread(8, 30, 900, skew=4.0), max_tokens=1024, rows=2),
    Case("short, V=151,936", 151_936, spread(4, 16, 64), max_tokens=1024, packed_length=256),
)
SMALL = Case("small", 256, spread(4, 3, 12), max_tokens=64, shape=stored.TINY)
ALIKE = ({"sdzero", "plain"}, {"TRL SFT padded", "TRL SFT padding-free", "TRL SFT packed"})


class Rows:
    """Traces, and for the peers two rows (context, target) per trace."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.folder, self.case = folder, case
        self.builder = ModelConfig(str(folder)).builder()
        scored = stored.stored_responses(self.builder, case)
        backwards = [s.rollout.token_ids for s in reversed(scored)]
        self.traces: list[Trace] = [self.builder.trace(s, ids) for s, ids in zip(scored, backwards, strict=True)]
        self.generation: list[tuple[TokenIds, TokenIds]] = []
        self.revision: list[tuple[TokenIds, TokenIds]] = []
        for t in self.traces:
            initial = t.init_ids + t.bridge_ids
            self.generation.append((t.prompt_ids, initial + t.revised_ids))
            self.revision.append((t.prompt_ids + initial, t.revised_ids))
        self.num_generated = sum(len(target) for _, target in self.generation)
        self.num_revised = sum(len(target) for _, target in self.revision)

    def dataset(self) -> Any:
        from datasets import Dataset  # pyright: ignore[reportMissingImports]

        rows = sorted([*self.generation, *self.revision], key=lambda row: -len(row[0] + row[1]))
        return Dataset.from_list(
            [{"input_ids": [*c, *t], "completion_mask": [0] * len(c) + [1] * len(t)} for c, t in rows]
        )


def sdzero(rows: Rows) -> Side:
    def make() -> SRT:
        return SRT(
            ModelConfig(str(rows.folder)),
            optimizer=loops.adamw,
            max_grad_norm=loops.MAX_GRAD_NORM,
            max_tokens_per_micro_batch=rows.case.max_tokens,
        )

    return loops.ours(make, lambda _, step: TraceBatch(rows.traces, step), rows.num_generated + rows.num_revised)


def plain(rows: Rows) -> Side:
    def step(models: list[nn.Module], side: Side) -> None:
        for term, num in ((rows.generation, rows.num_generated), (rows.revision, rows.num_revised)):
            for context, target in term:
                logits = loops.predictions(models[0], context, target)
                loss = cross_entropy(logits, torch.tensor(target, device=logits.device), reduction="sum") / num
                loss.backward()
                side.loss += loss.detach()
                side.tokens += len(target)

    return loops.plain(rows.folder, step, rows.num_generated + rows.num_revised)


def sft(rows: Rows, variant: str) -> Side:
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    class Counted(SFTTrainer):
        side: Side

        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.side.tokens += (inputs["labels"][:, 1:] != -100).sum()
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.side.loss += loss.detach()
            return loss

    def build(micro: int, num_rows: int) -> Counted:
        config = SFTConfig(
            **loops.trl_options(rows.folder, micro, num_rows),
            train_sampling_strategy="sequential",  # longest first: micro batches of similar lengths
            completion_only_loss=True,
            padding_free=variant == "padding-free",
            packing=variant == "packed",
            max_length=rows.case.packed_length if variant == "packed" else None,
        )
        tokenizer = rows.builder.tokenizer
        return Counted(str(rows.folder), args=config, train_dataset=rows.dataset(), processing_class=tokenizer)

    def make(side: Side) -> Counted:
        num_rows = 2 * len(rows.traces)
        micro = rows.case.flat_rows if variant == "padding-free" else rows.case.rows
        if variant == "packed":  # the number of rows is known after packing
            num_rows, micro = len(build(1, 1).train_dataset), 1
        trainer = build(micro, num_rows)
        trainer.side = side
        return trainer

    return loops.trl(make, rows.num_generated + rows.num_revised)


def sides_of(case: Case, folder: Path, with_trl: bool) -> tuple[dict[str, Side], int]:
    rows = Rows(case, folder)
    sides = {"sdzero": sdzero(rows), "plain": plain(rows)}
    if with_trl:
        sides |= {f"TRL SFT {variant}": sft(rows, variant) for variant in ("padded", "padding-free", "packed")}
    return sides, rows.num_generated


if __name__ == "__main__":
    stored.main("srt_step", __doc__ or "", CASES, SMALL, sides_of, ALIKE)
