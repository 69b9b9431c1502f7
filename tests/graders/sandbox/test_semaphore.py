"""Bounds on concurrent runs and their memory."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from sdzero.graders.sandbox.semaphore import ResourceSemaphore


@given(st.integers(1, 4), st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_neither_limit_is_exceeded_and_every_run_gets_its_turn(number: int, sizes: list[int]) -> None:
    under_way: list[int] = []
    most: list[tuple[int, int]] = []

    async def one(semaphore: ResourceSemaphore, size: int) -> None:
        async with semaphore.acquire(size):
            under_way.append(size)
            most.append((len(under_way), sum(under_way)))
            await asyncio.sleep(0)
            under_way.remove(size)

    async def main() -> None:
        semaphore = ResourceSemaphore(number, 256)
        await asyncio.gather(*(one(semaphore, size) for size in sizes))

    asyncio.run(main())
    assert len(most) == len(sizes)
    assert all(taken <= number and (memory <= 256 or taken == 1) for taken, memory in most)
