"""Every random draw has a name, and its seed is a hash of that name: a restarted run draws the same."""

from __future__ import annotations

import hashlib
import os


def derive_seed(*name: str | int) -> int:
    """A seed in [0, 2**31) for the draw called `name`, e.g. (run seed, stage, purpose, counter, call, rank)."""
    digest = hashlib.blake2b("\x1f".join(map(str, name)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


def run_seed() -> int:
    """The run's seed: what `seed_everything` (LightningCLI's key, `sdzero run --seed`) was given; else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
