"""Environment variables and patches that let vLLM run inside the trainer's process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch
from torch import distributed as dist

from sdzero.trainer.collectives import world_size


def keep_process_group() -> None:
    """Keep vLLM's shutdown from destroying torch's default process group, which is the trainer's."""
    from vllm.distributed import parallel_state

    def destroy_world() -> None:
        if parallel_state._WORLD:
            parallel_state._WORLD.destroy()
        parallel_state._WORLD = None

    parallel_state.destroy_distributed_environment = destroy_world


def use_unique_shared_memory() -> None:
    """Give the shared memory of this run's CPU engines a unique name. Collective.

    vLLM uses one name per machine: a second run would not start, nor any run after a killed one.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    run = [uuid4().hex]
    dist.broadcast_object_list(run)

    def make_group_name(communicator: Any) -> str:
        return f"sdzero-{run[0]}-{communicator.unique_name}-{communicator.ranks}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


def restore_model_classes(make_llm: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a constructor of `vllm.LLM` to undo its changes to transformers' model classes.

    Models that vLLM runs by transformers' code, such as Olmo 3, are built from classes that vLLM changes for the whole
    process: outside vLLM they could no longer be constructed, nor called if they were constructed before.
    """
    from vllm.model_executor.models.transformers.base import Base

    decorate, inits = Base._decorate_cls_for_torch_compile, {}

    def decorate_and_record(self: Any, cls: type, *args: Any, **kwargs: Any) -> None:
        inits.setdefault(cls, cls.__init__)
        decorate(self, cls, *args, **kwargs)
        cls.do_not_compile = True  # pyright: ignore[reportAttributeAccessIssue] - vLLM's own models override it

    def construct(**options: Any) -> Any:
        Base._decorate_cls_for_torch_compile = decorate_and_record
        try:
            return make_llm(**options)
        finally:
            Base._decorate_cls_for_torch_compile = decorate
            for cls, init in inits.items():
                cls.__init__ = init

    return construct


@contextmanager
def preserve_num_threads() -> Iterator[None]:
    """Restore torch's thread count and `torch.set_num_threads`, both of which vLLM's CPU worker replaces."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)


def repack_heads(model: Any) -> None:
    """Update the packed weight copies of vLLM's CPU layers after a reload.

    A reload packs only the layers whose weights are sent by name: a head tied to the embedding would never change.
    """
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


def environment_variables(tensor_parallel_size: int) -> dict[str, str]:
    """Return the variables that vLLM reads; Lightning's own launcher does not set those of the ranks."""
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
            # selects the trainer's GPU for vLLM
            "LOCAL_RANK": str(torch.cuda.current_device()) if on_gpu else os.environ.get("LOCAL_RANK", str(rank)),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
            "MASTER_PORT": os.environ.get("MASTER_PORT", "29500"),
        }
    return variables
