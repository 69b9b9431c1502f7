"""Runs of test_two_ranks.py on a tiny model. One process forks all ranks: imports cost more than the runs.

python method_ranks.py MODEL_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from support.ranks import evaluate_ranks, fsdp1_ranks, train_stored

if __name__ == "__main__":
    for part in (train_stored, evaluate_ranks, fsdp1_ranks):
        part.main(sys.argv[1], Path(sys.argv[2]))
