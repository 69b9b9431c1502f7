"""Two trainer ranks with a sharded model, each with its own vLLM engine, then with one engine over both.

python engine_ranks.py MODEL_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from vllm import LLM  # noqa: F401 - once, before the ranks are forked

from sdzero.engines import VLLMEngine
from sdzero.engines.base import EngineSpec, TokenChunk
from sdzero.prompts import PromptBuilder
from sdzero.trainer.collectives import all_gather_objects
from sdzero.types import Question, Sampling
from support.ranks.forked import run_ranks
from support.started_engines import check_logprobs


def work(model_path: str, store: Path, rank: int) -> None:
    for name in ("RANK", "WORLD_SIZE"):  # Lightning's own launcher does not set them either
        del os.environ[name]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sharded = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    builder = PromptBuilder.from_pretrained(model_path)
    for tensor_parallel_size in (1, 2):
        engine = VLLMEngine(tensor_parallel_size=tensor_parallel_size, kv_cache_gib=0.05)
        engine.start(EngineSpec(model_path, 96), builder)
        weights = (
            (name, weight.full_tensor()) for name, weight in sharded.named_parameters() if isinstance(weight, DTensor)
        )
        report = engine.sync(weights, 1)
        engine.warm_up()
        prompts = [builder.prompt(Question(f"{rank}-{i}", f"{rank} {i} ?", "")) for i in range(3 + 2 * rank)]
        # engines of their own may draw unlike numbers of tokens; one engine over both ranks draws alike on both
        length = 8 + 12 * rank if tensor_parallel_size == 1 else 10
        steps: list[Mapping[int, TokenChunk]] = []
        rollouts = engine.generate(prompts, Sampling(1.0, 1.0, length), 5 + rank, 1, steps.append)
        assert [rollout.prompt for rollout in rollouts] == prompts
        for place, rollout in enumerate(rollouts):  # a rank is handed its own, whoever shares the engine
            pieces = [step[place] for step in steps if place in step]
            assert rollout.token_ids == tuple(token for piece in pieces for token in piece.token_ids)
        assert {place for step in steps for place in step} == set(range(len(prompts)))
        # rank 0 has the first four tokens of its responses, rank 1 has all of its own and asks for nothing
        partials = [TokenChunk(r.token_ids, r.logprobs) for r in rollouts]
        if rank == 0:
            partials = [TokenChunk(piece.token_ids[:4], piece.logprobs[:4]) for piece in partials]
        whole = engine.generate(prompts, Sampling(1.0, 1.0, length), 15 + rank, 1, partials=partials)
        assert rank == 0 or whole == rollouts
        assert all(w.token_ids[:4] == r.token_ids[:4] for w, r in zip(whole, rollouts, strict=True))
        check_logprobs(reference, (*rollouts, *whole))
        sharded(input_ids=torch.tensor([prompts[0].token_ids])).logits.mean().backward()
        engine.close()
        assert len({*all_gather_objects(report.checksum)}) == 1
    dist.barrier()  # the trainer's process group outlives its engines
    dist.destroy_process_group()


if __name__ == "__main__":
    out = Path(sys.argv[2])
    run_ranks(2, out / "rank", partial(work, sys.argv[1], out / "store"))
