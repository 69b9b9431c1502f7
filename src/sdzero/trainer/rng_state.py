"""The global random states of every rank, as a checkpoint holds them.

The project's own draws have names and seeds of their own (`sdzero.utils.seeds`). These are for what draws without one:
dropout, a model's noise, a user's callback.
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


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """Of each rank those of Python, numpy, torch, and its own device if that is a GPU; numbers and tensors only.

    Collective.
    """
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


def restore(states: list[dict[str, Any]], device: torch.device, rank: int, num_ranks: int, step: int) -> None:
    """Sets this rank's random states. For another number of ranks they come from the run's seed, the step and the rank.

    The latter is logged.
    """
    if len(states) != num_ranks:
        log.warning(
            "the checkpoint holds the random states of %d ranks, and there are %d now: rank %d takes new ones from the "
            "run's seed, the step (%d) and its number",
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
