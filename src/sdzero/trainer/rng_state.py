"""Global RNG states of all ranks, for checkpoints.

The project's own sampling derives its seeds (`sdzero.utils.seeds`). These states serve the rest: dropout, a model's
noise, a user's callback.
"""

from __future__ import annotations

import logging
import random
from typing import Any, cast

import numpy as np
import torch

from sdzero.trainer.collectives import all_gather_objects
from sdzero.utils.seeds import derive_seed, run_seed

log = logging.getLogger(__name__)


def gather_rng_states(device: torch.device) -> list[dict[str, Any]]:
    """Gather each rank's states of Python, numpy, torch and its own GPU, as numbers and tensors. Collective."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    states: dict[str, Any] = {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [kind, torch.tensor(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return all_gather_objects(states)


def restore_rng_states(
    states: list[dict[str, Any]], device: torch.device, rank: int, num_ranks: int, step: int
) -> None:
    """Set this rank's RNG states; for another number of ranks, seed them by run seed, step and rank, with a warning."""
    if len(states) != num_ranks:
        log.warning(
            "the checkpoint holds the RNG states of %d ranks, but this run has %d: rank %d seeds its own from the "
            "run's seed, the step (%d) and its rank",
            *(len(states), num_ranks, rank, step),
        )
        seed = derive_seed(run_seed(), "random states", step, rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)  # of the GPUs too
        return
    own = states[rank]
    version, numbers, gauss = own["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    kind, keys, *rest = own["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(own["torch"])
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
