"""Rollouts: our vLLM engine against vLLM alone, weight sync against a copy, and the best shape of a generate call.

    python benchmarks/rollouts.py [--small] [--rounds N] [--out FOLDER]

- generate: `vLLM` is a separate `vllm.LLM` with the same prompts, settings and seed; `sdzero, journal` writes each
  step's tokens to disk, as collection and evaluation do.
- call size: the same requests in one call, and in calls of 32, 64 and 128.
- order: more requests than run at once, in the given order and longest prompts first, with response lengths that
  correlate with the prompts' and with lengths that do not.
- prefix: three revisions of each answer side by side, far apart, and without the prefix cache; tokens are the prompts'.
- sync: `copy` is `copy_` of all weights into a second model; `vLLM reload` is vLLM's part of our sync, without the
  check that all weights arrived; MiB per second.

In call size, order and prefix each request has a fixed length, the same for all sides; `steps` in the JSON file counts
the engine's steps, which do not depend on other load. `hidden 256` has 4 layers, `tiny` 3 layers of 64; weights are
random. Needs no network; about five minutes on one thread of a CPU.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Row, compare, one_thread, parser, write
from stored import SHAPE, TINY, Case, write_model
from transformers import AutoModelForCausalLM

from sdzero.data.journal import CallJournal
from sdzero.engines import VLLMEngine
from sdzero.engines.base import EngineSpec, preserve_rng
from sdzero.engines.vllm_requests import Request, sampling_params
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Rollout, Sampling, TokenIds

MODELS = {
    "hidden 256": SHAPE,
    "tiny": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 192},
}
VOCAB, MAX_MODEL_LEN, SEED = 4096, 1024, 1
END_EVERY = 64  # one id in 64 ends a response, so lengths are geometric


class Engines:
    """Our engine and a separate vLLM on the same weights, with the seconds of start-up and first calls."""

    def __init__(self, folder: Path, num_prompts: int, max_new_tokens: int) -> None:
        self.folder, self.rng = folder, random.Random(0)
        self.builder = PromptBuilder.from_pretrained(folder)
        self.builder.end_ids = frozenset({self.builder.end_id, *range(END_EVERY, VOCAB, END_EVERY)})
        self.sampling = Sampling(1.0, 1.0, max_new_tokens)
        self.prompts = [Prompt(Question(str(i), "", ""), self.ids(64)) for i in range(num_prompts)]
        self.journal = CallJournal(folder / "journal")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.ours = VLLMEngine(gpu_memory_utilization=0.3)
        seconds = {"start": _seconds(lambda: self.ours.start(EngineSpec(str(folder), MAX_MODEL_LEN), self.builder))}
        self.ours.sync(self.model.named_parameters(), 0)
        seconds |= {"warm_up": _seconds(self.ours.warm_up), "first call": _seconds(self.sdzero)}
        self.once = seconds | {"second call": _seconds(self.sdzero)}
        self.alone = self._alone()

    def _alone(self) -> Any:
        from vllm import LLM

        on_gpu = torch.cuda.is_available()
        return LLM(
            str(self.folder),
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=self.ours.max_num_seqs,
            enforce_eager=not on_gpu,
            skip_tokenizer_init=True,
            logprobs_mode="raw_logprobs",
            generation_config="vllm",
            disable_log_stats=True,
            **({"gpu_memory_utilization": 0.3} if on_gpu else {"kv_cache_memory_bytes": 2**30}),
        )

    def ids(self, num: int) -> TokenIds:
        return tuple(self.rng.randrange(VOCAB) for _ in range(num))

    def lengths(self, num: int, mean: float, most: int) -> list[int]:
        """Exponential lengths, cut at `most`."""
        return [min(most, 8 + int(self.rng.expovariate(1 / mean))) for _ in range(num)]

    # --- generate -------------------------------------------------------------------------------

    def sdzero(self) -> list[Rollout]:
        return self.ours.generate(self.prompts, self.sampling, SEED, 0)

    def journaled(self) -> list[Rollout]:
        with self.journal.append_partial("benchmark", "benchmark") as on_tokens:
            rollouts = self.ours.generate(self.prompts, self.sampling, SEED, 0, on_tokens)
        (self.journal.folder / "benchmark.partial").unlink()
        return rollouts

    def vllm(self) -> list[Any]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=self.sampling.max_new_tokens,
            stop_token_ids=sorted(self.builder.end_ids),
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )
        with preserve_rng(SEED):
            self.alone.reset_prefix_cache()  # as ours does
            prompts = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in self.prompts]
            return self.alone.generate(prompts, params, use_tqdm=False)

    def generate(self, name: str, rounds: int) -> list[Row]:
        ours = sum(len(rollout.token_ids) for rollout in self.sdzero())
        theirs = sum(len(output.outputs[0].token_ids) for output in self.vllm())
        if abs(ours - theirs) > 0.01 * theirs:
            raise RuntimeError(f"{name}: unequal work: sdzero sampled {ours} tokens, vLLM alone {theirs}")
        sides = {"vLLM": self.vllm, "sdzero": self.sdzero, "sdzero, journal": self.journaled}
        return compare(name, sides, "vLLM", rounds, work=ours)

    # --- requests of fixed length ----------------------------------------------------------------

    def answer(self, requests: Sequence[Request], cached: bool = True) -> dict[str, int]:
        """Make one call; return its steps and the prompt tokens read from the prefix cache."""
        plain = sampling_params(self.sampling, self.builder, by_step=False)
        steps = list[int]()  # per step, the cached tokens of the requests that end with it

        def params(max_tokens: int) -> Any:
            made = plain(max_tokens)
            made.stop_token_ids, made._all_stop_token_ids = [], set()
            made.skip_reading_prefix_cache = not cached
            return made

        self.ours.max_num_seqs = len(requests)  # keeps the given order
        engine = self.ours._llm.llm_engine
        step = engine.step

        def watched() -> list[Any]:
            outputs = step()
            steps.append(sum(output.num_cached_tokens or 0 for output in outputs))
            return outputs

        engine.step = watched
        try:
            with self.ours._steps(requests, params, SEED) as outcomes:
                deque(outcomes, 0)
        finally:
            engine.step = step
        return {"steps": len(steps), "cached": sum(steps)}

    def compared(
        self, name: str, sides: Mapping[str, Sequence[Sequence[Request]]], rounds: int, work: int, uncached: str = ""
    ) -> list[Row]:
        """Compare sides that make the given calls; the first is the reference."""
        seen: dict[str, list[dict[str, int]]] = {}

        def run(side: str) -> Callable[[], None]:
            def calls() -> None:
                seen[side] = [self.answer(call, cached=side != uncached) for call in sides[side]]

            return calls

        rows = compare(name, {side: run(side) for side in sides}, next(iter(sides)), rounds, work=work)
        for row in rows:
            for metric in ("steps", "cached"):
                row.metrics[metric] = sum(call[metric] for call in seen[row.side])
        return rows

    def call_sizes(self, name: str, rounds: int, num: int, sizes: Sequence[int], mean: float) -> list[Row]:
        requests = [Request(self.ids(32), length) for length in self.lengths(num, mean, 8 * int(mean))]
        sides = {f"one call of {num}": [requests]}
        for size in sizes:
            sides[f"calls of {size}"] = [requests[i : i + size] for i in range(0, num, size)]
        return self.compared(name, sides, rounds, sum(request.max_tokens for request in requests))

    def order(self, name: str, rounds: int, num: int, mean: float) -> list[Row]:
        prompts = [self.ids(length) for length in self.lengths(num, 2 * mean, MAX_MODEL_LEN // 2)]
        alike = [max(4, int(len(ids) * self.rng.uniform(0.3, 0.7))) for ids in prompts]
        rows = []
        for kind, lengths in (("like the prompts'", alike), ("unlike", self.rng.sample(alike, num))):
            given = [Request(ids, length) for ids, length in zip(prompts, lengths, strict=True)]
            longest = sorted(given, key=lambda request: -len(request.token_ids))
            sides = {"as they come": [given], "longest first": [longest]}
            rows += self.compared(f"{name}, {kind}", sides, rounds, sum(lengths))
        return rows

    def prefix(self, name: str, rounds: int, num: int, lengths: tuple[int, int]) -> list[Row]:
        answers = [Request(self.ids(self.rng.randint(*lengths)), 16) for _ in range(num)]
        beside = [answer for answer in answers for _ in range(3)]
        sides = {"side by side": [beside], "far apart": [answers * 3], "no prefix cache": [beside]}
        num_tokens = sum(len(request.token_ids) for request in beside)
        return self.compared(name, sides, rounds, num_tokens, uncached="no prefix cache")

    # --- sync -----------------------------------------------------------------------------------

    def sync(self, name: str, rounds: int) -> list[Row]:
        second = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

        @torch.no_grad()
        def copy() -> None:
            for there, here in zip(second.parameters(), self.model.parameters(), strict=True):
                there.copy_(here)

        def reload() -> None:
            self.alone.collective_rpc("reload_weights", kwargs={"weights_iterator": self.model.named_parameters()})

        sides = {
            "copy": copy,
            "vLLM reload": reload,
            "sdzero": lambda: self.ours.sync(self.model.named_parameters(), 0),
        }
        num_bytes = sum(weight.nbytes for weight in self.model.parameters())
        return compare(name, sides, "copy", rounds, work=num_bytes / 2**20)  # MiB a second

    def close(self) -> None:
        self.ours.close()
        self.alone.llm_engine.engine_core.shutdown()


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measured(name: str, folder: Path, rounds: int, small: bool) -> tuple[list[Row], dict[str, float]]:
    """Run all cases of one model; call sizes and order on the one with the most overhead per step."""
    num = 8 if small else 128
    engines = Engines(folder, num, 8 if small else 128)
    print(
        f"{name}, seconds once: " + ", ".join(f"{what} {took:.2f}" for what, took in engines.once.items()), flush=True
    )
    rows = engines.generate(f"{name}: generate", rounds)
    if name == "tiny":
        sizes = (2, 4) if small else (32, 64, 128)
        rows += engines.call_sizes(f"{name}: call size", rounds, 2 * num, sizes, 4 if small else 48)
        rows += engines.order(f"{name}: order", rounds, 3 * num, 4 if small else 32)
    if small or name != "tiny":
        rows += engines.prefix(f"{name}: prefix", rounds, 2 if small else 16, (300, 300) if small else (256, 512))
    rows += engines.sync(f"{name}: sync", rounds)
    engines.close()
    return rows, engines.once


def main() -> None:
    args = parser(__doc__, rounds=3).parse_args()
    if find_spec("vllm") is None:
        sys.exit("this benchmark needs vLLM: install one of the extras sdzero[cpu] and sdzero[cuda]")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    one_thread()
    rows, once = [], {}
    for name, shape in {"tiny": TINY}.items() if args.small else MODELS.items():
        with TemporaryDirectory() as folder:
            case = replace(Case(name, VOCAB, (), 0), shape=shape)
            write_model(Path(folder), case)
            new, once[name] = measured(name, Path(folder), args.rounds, args.small)
            rows += new
    settings = {"rounds": args.rounds, "models": MODELS, "vocabulary": VOCAB, "seconds_once": once}
    write("rollouts", __doc__ or "", settings, rows, args)


if __name__ == "__main__":
    main()
