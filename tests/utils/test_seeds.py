"""Seeds depend on their names and on nothing else: not on the process, the machine or the version."""

from __future__ import annotations

import itertools

from sdzero.utils.seeds import derive_seed, run_seed


def test_the_seeds_of_finished_runs_stay_what_they_were():
    """Pinned: a change would resume every unfinished run with other samples."""
    assert derive_seed(0, "self_distill", "rollout", 0, 0, 0) == 465120222
    assert derive_seed(1234, "collect", "revision", 17, 3, 1) == 1764123521


def test_every_part_of_the_name_and_its_place_count():
    assert derive_seed(1, 23) != derive_seed(12, 3) != derive_seed(123)
    assert derive_seed("a", "b") != derive_seed("b", "a")
    base = (7, "self_distill", "rollout", 4, 2, 1)
    changed = [(*base[:i], other, *base[i + 1 :]) for i, other in enumerate((8, "collect", "eval", 5, 3, 0))]
    assert len({derive_seed(*name) for name in [base, *changed]}) == 7


def test_neighbouring_names_share_no_seed_and_no_bit():
    names = list(itertools.product(range(3), ["collect", "rollout"], range(100), range(4), range(2)))
    seeds = [derive_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**31 for seed in seeds)  # numpy takes up to 2**32, vLLM a C int
    for bit in range(31):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - len(seeds) / 2) < 4 * (len(seeds) / 4) ** 0.5  # 4 standard deviations of a fair coin


def test_the_run_seed_is_that_of_seed_everything(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    assert run_seed() == 41
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert run_seed() == 0
