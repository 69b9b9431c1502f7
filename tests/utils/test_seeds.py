"""A draw's seed depends on its name and on nothing else: not the process, the machine or the version."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from sdzero.utils.seeds import derive_seed, run_seed

NAME = st.lists(st.integers(0, 10**6) | st.sampled_from(["collect", "rollout", "eval"]), min_size=1, max_size=5)


def test_the_seeds_of_finished_runs_stay_what_they_were():
    """Pinned: a change would resume every unfinished run with other draws."""
    assert derive_seed(0, "self_distill", "rollout", 0, 0, 0) == 465120222
    assert derive_seed(1234, "collect", "revision", 17, 3, 1) == 1764123521


def test_another_process_with_another_hash_seed_draws_the_same():
    code = "from sdzero.utils.seeds import derive_seed; print(derive_seed(0, 'collect', 5))"
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert int(out) == derive_seed(0, "collect", 5)


@given(NAME)
def test_a_seed_is_one_that_every_library_takes(name):
    assert 0 <= derive_seed(*name) < 2**31  # numpy takes up to 2**32, vLLM a C int


def test_every_part_of_the_name_and_its_place_count():
    assert derive_seed(1, 23) != derive_seed(12, 3) != derive_seed(123)
    assert derive_seed("a", "b") != derive_seed("b", "a")
    base = (7, "self_distill", "rollout", 4, 2, 1)
    changed = [(*base[:i], other, *base[i + 1 :]) for i, other in enumerate((8, "collect", "eval", 5, 3, 0))]
    assert len({derive_seed(*name) for name in [base, *changed]}) == 7


def test_neighbouring_draws_share_no_seed_and_no_bit():
    names = list(itertools.product(range(3), ["collect", "rollout"], range(100), range(4), range(2)))
    seeds = [derive_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    for bit in range(31):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - len(seeds) / 2) < 4 * (len(seeds) / 4) ** 0.5  # 4 standard deviations of a fair coin


def test_the_run_seed_is_what_seed_everything_was_given(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    assert run_seed() == 41
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert run_seed() == 0
