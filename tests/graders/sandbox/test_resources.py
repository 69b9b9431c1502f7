"""Bounds on concurrent runs and their memory; cgroups on fake trees of both versions, others on the real tree."""

import asyncio
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sdzero.graders.sandbox.resources import Cgroups, ResourceSemaphore


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


def tree(tmp_path: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    return tmp_path / "fs", tmp_path / "own"


def test_version_2_takes_the_nearest_folder_that_shares_memory(tmp_path: Path) -> None:
    files = {
        "cgroup.subtree_control": "memory pids",
        "user/cgroup.subtree_control": "memory pids",
        "user/app/cgroup.subtree_control": "pids",
    }
    root, own = tree(tmp_path, "0::/user/app/me\n", files)
    (root / "user/app/me").mkdir()
    made = Cgroups.delegate(os.getuid(), root, own)
    assert made and made.folder == root / f"user/sdzero-sandbox-{os.getpid()}"
    assert (made.folder / "server/cgroup.procs").read_text() == str(os.getpid())
    assert (made.folder / "cgroup.subtree_control").read_text() == "+memory"
    group = made.new(64)
    assert (group.path / "memory.max").read_text() == str(64 << 20)
    (group.path / "memory.events").write_text("low 0\nmax 7\noom 1\noom_kill 0\n")
    assert not group.out_of_memory() and group.peak_mb() == 0.0
    (group.path / "memory.events").write_text("low 0\nmax 7\noom 1\noom_kill 2\n")
    (group.path / "memory.peak").write_text(str(3 << 20))
    assert group.out_of_memory() and group.peak_mb() == 3.0


def test_version_1_takes_its_own_folder(tmp_path: Path) -> None:
    root, own = tree(tmp_path, "4:memory:/here\n3:cpuset:/\n0::/\n", {"memory/here/cgroup.procs": ""})
    made = Cgroups.delegate(os.getuid(), root, own)
    assert made and made.folder == root / f"memory/here/sdzero-sandbox-{os.getpid()}"
    group = made.new(64)
    assert (group.path / "memory.limit_in_bytes").read_text() == str(64 << 20)
    (group.path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert group.out_of_memory()


def test_none_where_nothing_is_shared(tmp_path: Path) -> None:
    root, own = tree(tmp_path, "0::/me\n", {"cgroup.subtree_control": "cpu", "me/cgroup.subtree_control": ""})
    assert Cgroups.delegate(os.getuid(), root, own) is None
    (tmp_path / "own").write_text("0::/elsewhere\n")
    assert Cgroups.delegate(os.getuid(), tmp_path / "nothing", own) is None
