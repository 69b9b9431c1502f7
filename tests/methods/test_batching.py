"""Padded and packed batches against the construction row by row; micro batches and their budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdzero.methods import SFT, SRT, Method, SelfDistill
from sdzero.methods.batching import collate, filler_example, micro_batches
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Example, LossOutput, Question, TraceBatch
from support.helpers import fit, make_batch, make_scored, make_trace

IDS = st.lists(st.integers(0, 99), max_size=9).map(tuple)
ROWS = st.lists(st.tuples(IDS.filter(bool), IDS), min_size=1, max_size=5)
SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 60)), max_size=20)


@given(ROWS, st.integers(0, 9))
def test_padded_rows_are_the_row_by_row_construction(rows, pad_id):
    batch = collate([c for c, _ in rows], [t for _, t in rows], pad_id)
    length = max(len(c) + len(t) for c, t in rows)
    input_ids, predicts, targets = [], [], []
    for context, target in rows:
        row = [*context, *target]
        input_ids.append(row + [pad_id] * (length - len(row)))
        predicts.append([len(context) <= i + 1 < len(row) for i in range(length)])
        targets += [row[i + 1] for i in range(length) if predicts[-1][i]]
    assert batch.input_ids.tolist() == input_ids
    assert batch.predicts.tolist() == predicts
    assert batch.targets.tolist() == targets
    assert batch.position_ids is None
    assert batch.input_ids.dtype == batch.targets.dtype == torch.long and batch.predicts.dtype == torch.bool
    assert int(batch.predicts.sum()) == len(batch.targets)
    assert torch.equal(batch.input_ids[:, 1:][batch.predicts[:, :-1]], batch.targets)


@given(ROWS)
def test_a_packed_row_is_its_sequences_end_to_end(rows):
    contexts, targets = [c for c, _ in rows], [t for _, t in rows]
    packed = collate(contexts, targets, 0, packed=True)
    alone = [collate([c], [t], 0) for c, t in rows]
    assert torch.equal(packed.input_ids, torch.cat([one.input_ids for one in alone], 1))
    assert torch.equal(packed.predicts, torch.cat([one.predicts for one in alone], 1))
    assert torch.equal(packed.targets, torch.cat([one.targets for one in alone]))
    assert packed.position_ids is not None
    assert packed.position_ids.tolist() == [[i for c, t in rows for i in range(len(c) + len(t))]]


def test_collate_needs_a_token_to_predict_from():
    with pytest.raises(AssertionError):
        collate([()], [(1,)], 0)
    with pytest.raises(AssertionError):
        collate([(1,)], [], 0)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_moves_as_a_whole(packed):
    moved = collate([(1,)], [(2,)], 0, packed).to(torch.device("meta"))
    assert moved.input_ids.is_meta and moved.predicts.is_meta and moved.targets.is_meta
    assert (moved.position_ids is not None and moved.position_ids.is_meta) if packed else moved.position_ids is None


@given(SIZES, st.integers(1, 200), st.booleans())
def test_micro_batches_hold_every_example_once_and_keep_the_budget(sizes, budget, packed):
    """The budget counts the longer of the student's and the teacher's sequence; what exceeds it stands alone."""
    examples = [Example(str(i), (1,) * c, (2,) * t, teacher_context=(3,) * tc) for i, (c, t, tc) in enumerate(sizes)]
    batches = micro_batches(examples, budget, packed)
    assert sorted(e.id for batch in batches for e in batch) == sorted(e.id for e in examples)
    for batch in batches:
        lengths = [max(len(e.context), len(e.teacher_context)) + len(e.target) for e in batch]
        used = sum(lengths) if packed else len(batch) * max(lengths)
        assert batch and (len(batch) == 1 or used <= budget)


@given(SIZES, st.integers(1, 200))
def test_no_two_packed_micro_batches_would_fit_into_one(sizes, budget):
    examples = [Example(str(i), (1,) * c, (2,) * t, teacher_context=(3,) * tc) for i, (c, t, tc) in enumerate(sizes)]
    used = sorted(sum(e.length for e in batch) for batch in micro_batches(examples, budget, packed=True))
    assert len(used) < 2 or used[0] + used[1] > budget


@pytest.mark.parametrize("kind", [SFT, SRT, SelfDistill])
def test_filler_rows_weigh_nothing(path: Path, builder: PromptBuilder, tmp_path: Path, kind: type[Method]) -> None:
    """A rank that has run out of rows computes one, so that all ranks meet: neither loss nor metrics change."""
    scored = [make_scored(builder, Question("q", "1+1=", "2"), text, reward=r) for r, text in enumerate(("3", "so 2"))]
    trace = make_trace(builder, "q", "1+1=3", "1+1=2", reward=0)
    batch = TraceBatch([trace], 0) if issubclass(kind, SFT) else make_batch(scored)
    found: list[LossOutput] = []

    class Collect(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, Method)
            rows = pl_module.examples(batch)
            counts = pl_module.loss_denominators(rows)
            # the padding token's embedding is 0: add a real example
            blank = [filler_example(pl_module.builder.pad_id), replace(rows[0], weight=0.0, reward=None)]
            found.extend(pl_module.loss(some, counts) for some in (rows, [*rows, *blank], blank))

    fit(kind(ModelConfig(str(path))), [batch], tmp_path, Collect())
    plain, filled, blank = found
    assert filled.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert blank.loss.item() == 0
    assert filled.metrics.keys() == plain.metrics.keys() == blank.metrics.keys()
    for name, value in plain.metrics.items():
        assert filled.metrics[name].item() == pytest.approx(value.item(), rel=1e-5)
        assert blank.metrics[name].item() == 0
