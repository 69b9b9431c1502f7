"""Memory peaks of training on small models, byte by byte, against the dry run's arithmetic.

    python benchmarks/memory.py [--small] [--case NAME] [--out FOLDER]

Each case is a real training, `SRT` or `SelfDistill` in Lightning's Trainer on stored responses, in its own process (two
under FullShard with gloo, each rank measured). torch's profiler records every allocation and release of torch's CPU
allocator, so peaks are exact; memory of other libraries is not included. The first step, which allocates the
optimizer's state, is left out. Prints a table and writes results/memory.json. About three minutes on one core.

`held` is the maximum between two steps; `backward` from a step's start to the optimizer's step, clipping included;
`update` in the optimizer's step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import loops
import measure
import stored
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Qwen3Config

from sdzero.data.base import stream_loader
from sdzero.methods import SRT, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.models.lora import Lora
from sdzero.pipeline.dry_run.assumptions import Architecture
from sdzero.pipeline.dry_run.memory import Machine
from sdzero.pipeline.dry_run.training import training_peaks
from sdzero.trainer.strategies import FullShard
from sdzero.types import RolloutBatch, TraceBatch

NUM_STEPS = 3
MARK = "phase: "
PHASES = ("held", "backward", "update")


@dataclass(frozen=True)
class Case:
    """Settings of a training and the sizes of its model.

    Args:
        name: as in the table.
        kind: `srt` or `self_distill`.
        hidden: width; that of the MLP is three times as large.
        layers: decoder layers.
        vocab: entries of the vocabulary.
        response: tokens of each response; a trace has two.
        micro_batches: per step and rank, one example each.
        ranks: 1, or processes under FullShard.
        precision: of the Trainer.
        tied: embedding and head are one weight.
        options: further keys of the model's configuration.
        arguments: further arguments of the method.
    """

    name: str
    kind: str
    hidden: int = 256
    layers: int = 6
    vocab: int = 4096
    response: int = 512
    micro_batches: int = 2
    ranks: int = 1
    precision: str = "32-true"
    tied: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, Any]:
        sizes = {"hidden_size": self.hidden, "intermediate_size": 3 * self.hidden, "num_hidden_layers": self.layers}
        return {**sizes, "num_attention_heads": self.hidden // 64, "tie_word_embeddings": self.tied}

    @property
    def stored(self) -> stored.Case:
        lengths = (self.response,) * (self.micro_batches * self.ranks)
        return stored.Case(self.name, self.vocab, lengths, max_tokens=1, shape=self.shape)


CHECKPOINTING = {"gradient_checkpointing": True}
EVERY = {"reduce_every_micro_batch": True}
CASES = (
    Case("srt", "srt"),
    Case("srt, checkpointing", "srt", options=CHECKPOINTING),
    Case("sd", "self_distill"),
    Case("sd, checkpointing", "self_distill", options=CHECKPOINTING),
    Case("sd, wide", "self_distill", hidden=512, layers=4, response=1024, options=CHECKPOINTING),
    Case("sd, deep", "self_distill", layers=16, response=1024, options=CHECKPOINTING),
    Case("srt, large vocabulary", "srt", vocab=65_536, layers=2, response=128, options=CHECKPOINTING),
    Case("sd, large vocabulary", "self_distill", vocab=65_536, layers=2, response=128, options=CHECKPOINTING),
    Case("srt, bf16", "srt", precision="bf16-mixed", response=1024, options=CHECKPOINTING),
    Case("sd, bf16", "self_distill", precision="bf16-mixed", response=1024, options=CHECKPOINTING),
    Case("sd, bf16, no checkpointing", "self_distill", precision="bf16-mixed"),
    Case("sd, bf16, large vocabulary", "self_distill", precision="bf16-mixed", vocab=65_536, layers=2, response=128),
    Case("srt, 2 ranks", "srt", ranks=2, options=CHECKPOINTING),
    Case("sd, 2 ranks", "self_distill", ranks=2, options=CHECKPOINTING),
    Case("sd, 2 ranks, one micro batch", "self_distill", ranks=2, micro_batches=1, options=CHECKPOINTING),
    Case("sd, 2 ranks, bf16", "self_distill", ranks=2, precision="bf16-mixed", options=CHECKPOINTING),
    Case("sd, 2 ranks, every micro batch", "self_distill", ranks=2, options=CHECKPOINTING, arguments=EVERY),
    Case(
        "sd, lora",
        "self_distill",
        response=1024,
        options={**CHECKPOINTING, "lora": {"rank": 16, "target_modules": "all-linear"}},
    ),
    Case("sd, 2 ranks, bf16, untied", "self_distill", ranks=2, precision="bf16-mixed", tied=False, vocab=16_384),
)
SMALL = (Case("sd, 2 ranks", "self_distill", hidden=128, layers=2, response=256, ranks=2, options=CHECKPOINTING),)
MIB = 2**20


class Marks(L.Callback):
    """Marks phases of a step in the profile and counts the bytes of each part at their start."""

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        self._mark("backward")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        weights = list(pl_module.student.parameters())
        state = [s for of in optimizer.state.values() for s in of.values() if torch.is_tensor(s) and s.numel() > 1]
        teacher = getattr(pl_module, "teacher", None)  # without weights of its own beside adapters
        self.parts = {
            "weights": local_bytes(weights),
            "gradients": local_bytes(p.grad for p in weights if p.grad is not None),
            "optimizer": local_bytes(state),
            "teacher": local_bytes(teacher.parameters()) if isinstance(teacher, nn.Module) else 0,
        }
        self._mark("update")

    def on_train_batch_end(self, *_: Any) -> None:
        self._mark("held")

    @staticmethod
    def _mark(name: str) -> None:
        with record_function(MARK + name):
            pass


def local_bytes(tensors: Any) -> int:
    """Bytes of this rank's shards."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def peaks(prof: Any) -> dict[str, int]:
    """Peak of allocated bytes in each phase after the first step."""
    live: dict[int, int] = {}
    now, phase, num_steps, found = 0, "", 0, dict.fromkeys(PHASES, 0)
    for event in sorted(events(prof.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns):
        if event.name == "[memory]":
            size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
            now -= live.pop(address, 0)
            if size > 0:
                now += live.setdefault(address, size)
        else:
            phase = event.name.removeprefix(MARK)
            num_steps += phase == "held"
        if num_steps:
            found[phase] = max(found[phase], now)
    return found


def events(tree: Iterable[Any]) -> Iterator[Any]:
    """Yield marks, allocations and releases, without gloo's copy of reduced tensors: NCCL makes none, and gloo releases
    it in a thread that the profiler does not record."""
    for event in tree:
        if event.name == "[memory]" or event.name.startswith(MARK):
            yield event
        if event.name != "c10d::_reduce_scatter_base_":
            yield from events(event.children)


def method_of(case: Case, folder: Path) -> SRT | SelfDistill:
    kind = SRT if case.kind == "srt" else SelfDistill
    options = {**case.options, **({"lora": Lora(**case.options["lora"])} if "lora" in case.options else {})}
    model = ModelConfig(str(folder), **options)
    return kind(model, optimizer=loops.adamw, max_tokens_per_micro_batch=1, **case.arguments)


def batches(case: Case, method: SRT | SelfDistill, rank: int) -> Iterator[TraceBatch | RolloutBatch]:
    """Yield a rank's batches: the same responses in every step."""
    scored = stored.stored_responses(method.builder, case.stored)[rank :: case.ranks]
    traces = [method.builder.trace(s, s.rollout.token_ids) for s in scored]
    for step in range(NUM_STEPS):
        yield TraceBatch(traces, step) if case.kind == "srt" else RolloutBatch(scored, step, step)


def longest(batch: TraceBatch | RolloutBatch) -> int:
    """Tokens of the student's longest sequence."""
    if isinstance(batch, TraceBatch):
        return max(len(t.prompt_ids + t.init_ids + t.bridge_ids + t.revised_ids) for t in batch.traces)
    return max(len(s.rollout.prompt.token_ids + s.rollout.token_ids) for s in batch.scored)


def train(case: Case, folder: Path) -> None:
    """Train in each rank's process; write rankN.json."""
    marks = Marks()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        method = method_of(case, folder)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=case.ranks,
            strategy=FullShard() if case.ranks > 1 else "auto",
            precision=case.precision,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[marks],
            default_root_dir=folder,
        )
        loader = stream_loader(NUM_STEPS, lambda: batches(case, method, trainer.global_rank))
        trainer.fit(method, train_dataloaders=loader)
    num_tokens = longest(next(batches(case, method, trainer.global_rank)))
    found = {"peaks": peaks(prof), "parts": marks.parts, "num_tokens": num_tokens}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


def arithmetic(case: Case, num_tokens: int) -> dict[str, dict[str, int]]:
    """Phase -> part -> bytes by the dry run; of loss head and backward pass the larger."""
    model = Architecture(Qwen3Config(vocab_size=case.vocab, **{**stored.MODEL, **case.shape}))
    at = Machine(False, case.ranks, case.ranks, 2 if "bf16" in case.precision else 4)
    settings = {"cpu_offload": False, "gradient_checkpointing": False, "dtype": "float32", **case.options}
    arguments = {**case.arguments, "student": settings, "optimizer": {"init_args": {"fused": True}}}
    teacher = (model, 0 if "lora" in settings else 4) if case.kind == "self_distill" else None
    config = {"model": {"init_args": arguments}}
    loss, backward, update = training_peaks(case.kind, config, model, teacher, at, num_tokens, case.micro_batches > 1)
    return {"backward": max((loss, backward), key=lambda m: m.total).parts, "update": update.parts}


def rows_of(case: Case, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per phase, of the rank that needed most.

    Raises:
        RuntimeError: bytes of weights, optimizer or reduced gradients differ from the computed ones.
    """
    worst = max(ranks, key=lambda rank: rank["peaks"]["backward"])
    said = arithmetic(case, worst["num_tokens"])
    for part in ("weights", "gradients", "optimizer"):
        if abs(worst["parts"][part] - said["update"][part]) > 0.001 * said["update"][part]:
            raise RuntimeError(f"{case.name}: {part}: {worst['parts'][part]} bytes, computed {said['update'][part]}")
    rows = []
    for phase, parts in said.items():
        measured, total = worst["peaks"][phase], sum(parts.values())
        rows.append({"case": case.name, "phase": phase, "measured": measured, "said": total, "ratio": total / measured})
        print(
            f"{case.name:34} {phase:9} {measured / MIB:8.1f} {total / MIB:8.1f} MiB {total / measured:6.3f}",
            flush=True,
        )
    return rows


def measured(case: Case) -> list[dict[str, Any]]:
    """Train one case in its own processes."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        stored.write_model(folder, case.stored)
        (folder / "case.json").write_text(json.dumps(asdict(case)))
        command = [sys.executable, __file__, "--train", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            raise RuntimeError(f"{case.name}: {done.stderr[-3000:]}")
        return rows_of(case, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(case.ranks)])


def main() -> None:
    parser = measure.parser(__doc__, rounds=1)
    parser.add_argument("--case", help="run only the cases whose names start so")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    stored.quiet()
    measure.one_thread()
    if given.train:
        return train(Case(**json.loads((given.train / "case.json").read_text())), given.train)
    chosen = [case for case in (SMALL if given.small else CASES) if case.name.startswith(given.case or "")]
    rows = [row for case in chosen for row in measured(case)]
    settings = {"steps": NUM_STEPS, "cases": [asdict(case) for case in chosen]}
    measure.write("memory", __doc__ or "", settings, rows, given)


if __name__ == "__main__":
    main()
