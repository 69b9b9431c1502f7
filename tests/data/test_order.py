"""Items of a step: every epoch a new order, every rank its own share, nothing lost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.data.base import StepDataModule
from sdzero.types import TraceBatch


class Numbers(StepDataModule):
    """Items 0 .. num - 1."""

    def __init__(self, num: int, items_per_step: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(items_per_step)
        self.num = num
        self.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=None)  # pyright: ignore

    @property
    def num_items(self) -> int:
        return self.num

    def make_batch(self, counter: int, indices: object) -> object:
        return [counter, indices]


def epoch(data: Numbers, number: int) -> list[list[int]]:
    """The steps of an epoch."""
    return [data.indices(number * data.steps_per_epoch + step) for step in range(data.steps_per_epoch)]


@given(num=st.integers(1, 40), size=st.integers(1, 12), world_size=st.integers(1, 5), number=st.integers(0, 3))
def test_shares_of_all_ranks_are_the_step_and_steps_are_the_epoch(
    num: int, size: int, world_size: int, number: int
) -> None:
    alone = epoch(Numbers(num, size), number)
    ranks = [epoch(Numbers(num, size, rank, world_size), number) for rank in range(world_size)]
    assert sorted(i for step in alone for i in step) == list(range(num))
    assert [len(step) for step in alone] == [size] * (num // size) + [num % size] * (num % size > 0)
    for step, *shares in zip(alone, *ranks, strict=True):
        assert sorted(i for share in shares for i in share) == sorted(step), "disjoint, and together the step"
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_every_epoch_and_every_seed_has_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Numbers(50, 7)
    orders = []
    for seed in (0, 1):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        orders += [tuple(i for step in epoch(data, number) for i in step) for number in range(5)]
    assert len(set(orders)) == 10 and tuple(range(50)) not in orders
    assert orders[5] == tuple(i for step in epoch(Numbers(50, 10), 0) for i in step), "whatever the step's size"


def test_an_epoch_continues_at_the_counter() -> None:
    data = Numbers(10, 4)
    assert len(data.train_dataloader()) == 3
    whole = [*data.train_dataloader(), *data.train_dataloader()]
    assert [counter for counter, _ in whole] == list(range(6)) and data.state_dict() == {"counter": 6}
    for done in range(6):
        again = Numbers(10, 4)
        again.load_state_dict({"counter": done})
        rest = [*again.train_dataloader()]
        assert rest == whole[done : (done // 3 + 1) * 3]
        assert [*again.train_dataloader()] == (whole[3:] if done < 3 else [[c, again.indices(c)] for c in (6, 7, 8)])


def test_the_counter_moves_before_the_step() -> None:
    """A checkpoint of a step must not repeat its batch."""
    data = Numbers(4, 2)
    batches = iter(data.train_dataloader())
    assert data.counter == 0
    next(batches)
    assert data.state_dict() == {"counter": 1}


def test_batches_are_not_moved() -> None:
    assert (batch := TraceBatch([], 3)).to("cuda") is batch
