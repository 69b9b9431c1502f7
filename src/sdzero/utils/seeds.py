"""Seeds derived by hashing a purpose, so that a restarted run samples the same."""

from __future__ import annotations

import hashlib
import os


def derive_seed(*name: str | int) -> int:
    """Hash `name`, e.g. (run seed, stage, purpose, counter, call, rank), to a seed in [0, 2**31)."""
    digest = hashlib.blake2b("\x1f".join(map(str, name)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


def run_seed() -> int:
    """Return the seed given to `seed_everything` (LightningCLI's key, `sdzero run --seed`); 0 by default."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
