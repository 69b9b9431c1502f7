"""What vLLM reads in a process that is not its own, and what it does to it, undone: here the trainer lives in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch
from torch import distributed as dist


def spare_process_group() -> None:
    """vLLM's shutdown destroys torch's default process group, whoever made it. Here the trainer did, and needs it."""
    from vllm.distributed import parallel_state

    def destroy_world() -> None:
        if parallel_state._WORLD:
            parallel_state._WORLD.destroy()
        parallel_state._WORLD = None

    parallel_state.destroy_distributed_environment = destroy_world


def own_shared_memory() -> None:
    """On the CPU the ranks of an engine meet in shared memory, whose name vLLM makes the same on a whole machine: no
    second run would start, and none after a killed one, which leaves it behind. Collective."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    run = [uuid4().hex]
    dist.broadcast_object_list(run)

    def make_group_name(communicator: Any) -> str:
        return f"sdzero-{run[0]}-{communicator.unique_name}-{communicator.ranks}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


def sparing_model_classes(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, which makes a vLLM, without its harm to transformers' classes. Models that vLLM runs by transformers' own
    code, as Olmo 3, are built from classes that it changes for the whole process: they could no longer be made outside
    vLLM, nor called where they were made before."""
    from vllm.model_executor.models.transformers.base import Base

    decorate, inits = Base._decorate_cls_for_torch_compile, {}

    def decorate_and_note(self: Any, cls: type, *args: Any, **kwargs: Any) -> None:
        inits.setdefault(cls, cls.__init__)
        decorate(self, cls, *args, **kwargs)
        cls.do_not_compile = True  # pyright: ignore[reportAttributeAccessIssue] - vLLM's own models say otherwise

    def sparing(**options: Any) -> Any:
        Base._decorate_cls_for_torch_compile = decorate_and_note
        try:
            return make(**options)
        finally:
            Base._decorate_cls_for_torch_compile = decorate
            for cls, init in inits.items():
                cls.__init__ = init

    return sparing


@contextmanager
def preserve_num_threads() -> Iterator[None]:
    """vLLM's CPU worker changes torch's thread count and replaces `torch.set_num_threads`, for the trainer too."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)


def repack_heads(model: Any) -> None:
    """vLLM's CPU layers multiply by a packed copy of their weight, and a reload packs anew only what was sent to a
    layer by name: a head tied to the embedding would keep the copy of its first weights for good."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def environment(tensor_parallel_size: int) -> dict[str, str]:
    """What vLLM reads from the environment; the ranks' part is missing under Lightning's own launcher."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())),  # else it sets 1
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }
    num_ranks = world_size()
    if num_ranks % tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size {tensor_parallel_size} must divide the number of processes, which is {num_ranks}: "
            "start one process per GPU (trainer.devices)"
        )
    if num_ranks > 1:
        rank = dist.get_rank()
        on_gpu = torch.cuda.is_available()
        variables |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            # the GPU that vLLM takes: the trainer's
            "LOCAL_RANK": str(torch.cuda.current_device()) if on_gpu else os.environ.get("LOCAL_RANK", str(rank)),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
            "MASTER_PORT": os.environ.get("MASTER_PORT", "29500"),
        }
    return variables
