"""Memory peaks of all stages, and errors that would make a recipe fail, each with the key to change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdzero.pipeline.dry_run.assumptions import ASSUMPTIONS, Architecture, Assumptions, load_architecture
from sdzero.pipeline.dry_run.budget import DryStage, num_traces
from sdzero.pipeline.dry_run.memory import FLOAT32, GIB, Machine, MemoryPeak, machine
from sdzero.pipeline.dry_run.sampling import engine, rollout_peak
from sdzero.pipeline.dry_run.training import resident, training_peaks


@dataclass
class Memory:
    """Memory of a recipe."""

    peaks: list[MemoryPeak] = field(default_factory=list)  # of all stages, in order
    refusals: list[str] = field(default_factory=list)  # reasons why the recipe cannot work, one line each
    notes: list[str] = field(default_factory=list)  # remarks, one line each


class MemoryCheck:
    """Estimates the memory of every stage.

    Args:
        stages: stages in order.
        assumptions: the recipe's dry_run.yaml, or None.
        model: architecture of the model in all stages.
    """

    def __init__(self, stages: Sequence[DryStage], assumptions: Assumptions | None, model: Architecture) -> None:
        self.stages, self.assumptions, self.model = stages, assumptions, model
        self.prompt = assumptions.max_prompt_tokens if assumptions else 0
        self.gpu_bytes = int(assumptions.gpu_memory_gib * GIB) if assumptions else None
        self.found = Memory()

    def run(self) -> Memory:
        for stage in self.stages:
            at = machine(stage.config, self.assumptions.num_gpus if self.assumptions else None)
            self._check_processes(stage, at)
            if stage.kind == "collection":
                self._collect(stage, at)
            elif stage.kind == "evaluation":
                self._sample(stage, {"weights": FLOAT32 * self.model.num_parameters // at.num_shards}, at, 0)
            elif stage.kind != "other":
                self._train(stage, at)
        return self.found

    def _check_processes(self, stage: DryStage, at: Machine) -> None:
        key = "devices" if stage.kind == "collection" else "trainer.devices"
        if self.assumptions and at.on_gpu and at.world_size > (num_gpus := self.assumptions.num_gpus):
            self._refuse(stage, f"{key} asks for {at.world_size} GPUs; num_gpus of {ASSUMPTIONS} is {num_gpus}")
        spec = stage.data.get("engine") or {}
        for key, size in {
            "trainer.strategy.data_parallel_size": at.num_shards,
            "trainer.strategy.tensor_parallel_size": at.tensor_parallel,
            "engine.tensor_parallel_size": spec.get("init_args", {}).get("tensor_parallel_size", 1),
        }.items():
            if at.world_size % size:
                self._refuse(stage, f"{key} {size} does not divide the number of processes, {at.world_size}")

    def _check_positions(self, stage: DryStage, key: str, needed: int, what: str) -> None:
        if needed > (most := self.model.max_positions):
            has = f"the model has {most:,} positions: lower it"
            self._refuse(stage, f"{key}: {what} needs {needed:,} tokens, and {has}")

    def _collect(self, stage: DryStage, at: Machine) -> None:
        new = stage.config["sampling"]["max_new_tokens"]
        longest = self.prompt + 2 * new
        self._check_positions(stage, "sampling.max_new_tokens", longest, "an answer with its revision")
        self._add_rollout(stage, None, at, longest, self.prompt + new)

    def _sample(self, stage: DryStage, kept: Mapping[str, int], at: Machine, longest: int) -> None:
        """Add a stage's sampling; `longest` is the longest rollout of its training, 0 if only evaluation samples."""
        evaluation, response = stage.data["evaluation"], longest
        if evaluation["num_questions"] != 0:
            new = evaluation["sampling"]["max_new_tokens"]
            key = "data.evaluation.sampling.max_new_tokens"
            self._check_positions(stage, key, self.prompt + new, "an answer")
            # answers that leave no room are not revised
            longest = max(longest, min(self.prompt + 2 * new, self.model.max_positions))
            response = max(response, self.prompt + new)
        if longest:
            self._add_rollout(stage, kept, at, longest, response)

    def _add_rollout(
        self, stage: DryStage, kept: Mapping[str, int] | None, at: Machine, longest: int, response: int
    ) -> None:
        if (spec := stage.data.get("engine")) is None:
            return
        mean = 0
        if self.assumptions:
            is_longer = stage.learned_to_revise or stage.kind == "rollouts"
            response_mean = "phase2_response_tokens" if is_longer else "mean_response_tokens"
            mean = self.prompt + getattr(self.assumptions, response_mean)
        beside = engine(spec, stage.data["engine_dtype"], self.model, at, longest, mean, self.gpu_bytes)
        if beside is None:
            where = ": it samples elsewhere" if spec["class_path"].endswith(".RemoteVLLMEngine") else ""
            self.found.notes.append(f"{stage.name}: the memory of {spec['class_path']} is not modelled{where}")
            return
        peak = rollout_peak(stage.name, self.model, kept, at, beside, response)
        self.found.peaks.append(peak)
        if beside.cache is not None and beside.cache < beside.per_longest:
            key = "engine.gpu_memory_utilization" if at.on_gpu else "engine.kv_cache_gib"
            more = f"raise {key}, or engine.tensor_parallel_size" if at.on_gpu else f"raise {key}"
            self._refuse(
                stage,
                f"{key} leaves {max(beside.cache, 0) / GIB:.1f} GiB for keys and values, and the longest sequence of "
                f"{stage.name} ({beside.longest:,} tokens) needs {beside.per_longest / GIB:.1f}: {more}, or lower "
                "sampling.max_new_tokens",
            )
        key = "engine.max_batch_size" if beside.cache is None else "engine.gpu_memory_utilization"
        self._check_gpu(stage, at, peak, f"lower {key}")

    def _train(self, stage: DryStage, at: Machine) -> None:
        arguments, data = stage.config["model"]["init_args"], stage.data
        teacher = self._teacher(stage, arguments) if "context" in arguments else None
        if stage.kind == "rollouts":
            response = data["sampling"]["max_new_tokens"]
            student = longest_rollout = self.prompt + response
            # the Revision context reads the response before it scores it; other contexts have no bound beforehand
            is_revision = teacher and arguments["context"]["class_path"].endswith(".Revision")
            reads = student + (response if is_revision else 0)
            self._check_positions(stage, "data.sampling.max_new_tokens", reads, "what the teacher reads")
            per_step = data["prompts_per_step"] * data["rollouts_per_prompt"]
        else:
            assert stage.collection is not None
            reads, longest_rollout = 0, 0
            student = self.prompt + 2 * stage.collection["sampling"]["max_new_tokens"]
            student = min(student, self.model.max_positions)
            per_step = min(data["traces_per_step"], num_traces(stage.collection, self.assumptions)[0])
        limit = arguments["max_tokens_per_micro_batch"]
        on_rank = math.ceil(per_step * at.tensor_parallel / at.world_size)
        accumulates = on_rank > 1 and on_rank * max(student, reads) > limit
        peaks = training_peaks(stage.name, stage.config, self.model, teacher, at, max(limit, student), accumulates)
        self.found.peaks += peaks
        *passes, update = peaks
        for peak in (max(passes, key=lambda peak: peak.total), update):  # one line for loss head and backward
            self._check_gpu(stage, at, peak, _advice(peak, arguments, at, max(student, reads), self.gpu_bytes or 0))
        self._sample(stage, resident(self.model, teacher, at, arguments["student"]), at, longest_rollout)

    def _teacher(self, stage: DryStage, arguments: Mapping[str, Any]) -> tuple[Architecture, int]:
        """Return the teacher's sizes and the bytes of its elements. By default it is the student as it starts, beside
        adapters the student's own weights."""
        named = arguments["teacher"]
        if named is None:
            return self.model, 0 if arguments["student"].get("lora") else 4
        sizes = load_architecture(named["path"], None)
        if sizes is None:
            note = f"{stage.name}: the teacher at {named['path']} is assumed to have the student's size"
            self.found.notes.append(note)
        return sizes or self.model, 2 if named["dtype"] == "bfloat16" else 4

    def _check_gpu(self, stage: DryStage, at: Machine, peak: MemoryPeak, advice: str) -> None:
        if self.gpu_bytes and at.on_gpu and peak.total > self.gpu_bytes:
            what = {"update": "the optimizer's step", "rollout": "sampling"}.get(peak.name, "training")
            sizes = f"{peak.total / GIB:.1f} GiB of a GPU's {self.gpu_bytes / GIB:.1f}"
            self._refuse(stage, f"{what} of {stage.name} needs {sizes}: {advice}")

    def _refuse(self, stage: DryStage, reason: str) -> None:
        self.found.refusals.append(f"{stage.file}: {reason}")


def _advice(peak: MemoryPeak, arguments: Mapping[str, Any], at: Machine, longest: int, gpu_bytes: int) -> str:
    """Remedy for a peak: less in a micro batch if the rest fits, else less of each model on a GPU."""
    batch = sum(peak.parts.get(part, 0) for part in ("activations", "loss head"))
    if peak.total - batch < gpu_bytes:
        if not arguments["student"]["gradient_checkpointing"]:
            return "set model.student.gradient_checkpointing: true"
        if arguments["max_tokens_per_micro_batch"] > longest:
            return f"lower model.max_tokens_per_micro_batch; the longest example has {longest:,} tokens"
    if peak.parts["gradients"] > peak.parts["optimizer"] and not arguments["student"]["cpu_offload"]:  # unreduced
        return "set model.reduce_every_micro_batch: true, or take more GPUs (trainer.devices)"
    if at.num_shards == 1:
        return "shard the model over several GPUs: trainer.strategy (configs/trainer/fsdp2.yaml) and trainer.devices"
    if peak.parts["teacher"] and (arguments["teacher"] or {}).get("dtype") != "bfloat16":
        return "set model.teacher.dtype: bfloat16, or take more GPUs (trainer.devices)"
    return "take more GPUs (trainer.devices), lower sampling.max_new_tokens, or set model.student.cpu_offload: true"


def unreachable_lengths(stages: Iterable[DryStage], assumptions: Assumptions) -> Iterator[str]:
    """Notes on mean lengths in dry_run.yaml above what a stage may sample."""
    names = {"collection": "mean_response_tokens", "rollouts": "phase2_response_tokens"}
    for stage in stages:
        if (name := names.get(stage.kind)) is None:
            continue
        assumed, most = getattr(assumptions, name), stage.data["sampling"]["max_new_tokens"]
        if assumed > most:
            yield (
                f"{stage.name}: {name} of {ASSUMPTIONS}, {assumed:,}, is above sampling.max_new_tokens, {most:,}: at "
                f"most {most / assumed:.1%} of the tokens above are possible"
            )
