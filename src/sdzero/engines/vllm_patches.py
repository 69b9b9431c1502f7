"""What vLLM does to a process that is not its own, undone: here the trainer lives in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

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
