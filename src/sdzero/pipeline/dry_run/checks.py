"""The moments of all stages, and what of a recipe cannot work: one line a reason, with the key to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdzero.pipeline.dry_run.assumptions import Architecture, Assumptions, Config, load_architecture
from sdzero.pipeline.dry_run.budget import num_traces
from sdzero.pipeline.dry_run.memory import GIB, Engine, Machine, Moment, Resident, machine
from sdzero.pipeline.dry_run.sampling import engine, rollout_moment
from sdzero.pipeline.dry_run.training import resident, training_moments


@dataclass
class Memory:
    """moments: of all stages, in order; refusals and notes: one line each."""

    moments: list[Moment] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Survey:
    """Goes through the stages.

    Args:
        configs: by stage, in order.
        assumptions: plan.yaml, or None.
        model: the architecture of all stages.
    """

    def __init__(self, configs: Mapping[str, Config], assumptions: Assumptions | None, model: Architecture) -> None:
        self.configs, self.assumptions, self.model = configs, assumptions, model
        self.prompt = assumptions.max_prompt_tokens if assumptions else 0
        self.gpu_bytes = int(assumptions.gpu_memory_gib * GIB) if assumptions else None
        self.found = Memory()

    def run(self) -> Memory:
        for stage, config in self.configs.items():
            at = machine(config, self.assumptions.num_gpus if self.assumptions else None)
            self._check_processes(stage, config, at)
            if stage == "collect":
                self._collect(config, at)
            elif stage.endswith("/eval"):
                self._sample(stage, config, Resident(4 * self.model.num_parameters // at.num_shards, 0, 0), at, 0)
            elif stage in ("srt", "self_distill"):
                self._train(stage, config, at)
        return self.found

    def _check_processes(self, stage: str, config: Config, at: Machine) -> None:
        file, key = _file(stage), "devices" if stage == "collect" else "trainer.devices"
        if self.assumptions and at.on_gpu and at.world_size > self.assumptions.num_gpus:
            self.found.refusals.append(
                f"{file}: {key} asks for {at.world_size} GPUs; num_gpus of plan.yaml has {self.assumptions.num_gpus}"
            )
        if at.world_size % at.num_shards:
            self.found.refusals.append(
                f"{file}: trainer.strategy.data_parallel_size {at.num_shards} does not divide the number of processes, "
                f"{at.world_size}"
            )
        if at.world_size % at.tensor_parallel:
            self.found.refusals.append(
                f"{file}: trainer.strategy.tensor_parallel_size {at.tensor_parallel} does not divide the number of "
                f"processes, {at.world_size}"
            )
        spec = _engine_spec(stage, config)
        size = (spec or {}).get("init_args", {}).get("tensor_parallel_size", 1)
        if at.world_size % size:
            self.found.refusals.append(
                f"{file}: engine.tensor_parallel_size {size} does not divide the number of processes, {at.world_size}"
            )

    def _check_positions(self, stage: str, key: str, needed: int, what: str) -> None:
        if needed > self.model.max_positions:
            self.found.refusals.append(
                f"{_file(stage)}: {key}: {what} needs {needed:,} tokens, and the model has "
                f"{self.model.max_positions:,} positions: lower it"
            )

    def _collect(self, config: Config, at: Machine) -> None:
        new = config["sampling"]["max_new_tokens"]
        longest = self.prompt + 2 * new
        self._check_positions("collect", "sampling.max_new_tokens", longest, "an answer with its revision")
        self._add_rollout("collect", config, None, at, longest, self.prompt + new)

    def _sample(self, stage: str, config: Config, kept: Resident, at: Machine, longest: int) -> None:
        """A stage's rollouts; `longest` is that of its training, 0 where only the evaluation samples."""
        data = config["data"]["init_args"]
        evaluation, response = data["evaluation"], longest
        if evaluation["num_questions"] != 0:
            new = evaluation["sampling"]["max_new_tokens"]
            key = "data.evaluation.sampling.max_new_tokens"
            self._check_positions(stage, key, self.prompt + new, "an answer")
            # answers that leave no room are not revised
            longest = max(longest, min(self.prompt + 2 * new, self.model.max_positions))
            response = max(response, self.prompt + new)
        if longest:
            self._add_rollout(stage, config, kept, at, longest, response)

    def _add_rollout(
        self, stage: str, config: Config, kept: Resident | None, at: Machine, longest: int, response: int
    ) -> None:
        spec = _engine_spec(stage, config)
        if spec is None:
            return
        dtype = config["engine_dtype"] if stage == "collect" else config["data"]["init_args"]["engine_dtype"]
        mean = self.prompt + self._mean_response(stage) if self.assumptions else 0
        beside = engine(spec, dtype, self.model, at, longest, mean, self.gpu_bytes)
        if beside is None:
            where = ": it samples elsewhere" if spec["class_path"].endswith(".RemoteVLLMEngine") else ""
            self.found.notes.append(f"{stage}: the memory of {spec['class_path']} is not modelled here{where}")
            return
        moment = rollout_moment(stage, self.model, kept, at, beside, response)
        self.found.moments.append(moment)
        self._check_cache(stage, beside, at)
        if self.gpu_bytes and at.on_gpu and moment.total > self.gpu_bytes:
            key = "engine.max_batch_size" if beside.cache is None else "engine.gpu_memory_utilization"
            self._refuse(moment, f"lower {key}")

    def _mean_response(self, stage: str) -> int:
        assert self.assumptions
        longer = stage in ("srt", "srt/eval", "self_distill")
        return self.assumptions.phase2_response_tokens if longer else self.assumptions.mean_response_tokens

    def _check_cache(self, stage: str, beside: Engine, at: Machine) -> None:
        if beside.cache is None or beside.cache >= beside.per_longest:
            return
        share = "engine.gpu_memory_utilization" if at.on_gpu else "engine.kv_cache_gib"
        more = f"raise {share}, or engine.tensor_parallel_size" if at.on_gpu else f"raise {share}"
        self.found.refusals.append(
            f"{_file(stage)}: {share} leaves {max(beside.cache, 0) / GIB:.1f} GiB for keys and values, and the longest "
            f"sequence of {stage} ({beside.longest:,} tokens) needs {beside.per_longest / GIB:.1f}: {more}, or lower "
            "sampling.max_new_tokens"
        )

    def _train(self, stage: str, config: Config, at: Machine) -> None:
        arguments, data = config["model"]["init_args"], config["data"]["init_args"]
        teacher, reads = None, 0
        if stage == "self_distill":
            teacher = self._teacher(arguments)
            student = self.prompt + data["sampling"]["max_new_tokens"]
            # the Revision context reads the response before it scores it; other contexts have no bound beforehand
            is_revision = arguments["context"]["class_path"].endswith(".Revision")
            reads = student + (data["sampling"]["max_new_tokens"] if is_revision else 0)
            self._check_positions(stage, "data.sampling.max_new_tokens", reads, "what the teacher reads")
            per_step, longest_rollout = data["prompts_per_step"] * data["rollouts_per_prompt"], student
        else:
            collect = self.configs["collect"]
            student = min(self.prompt + 2 * collect["sampling"]["max_new_tokens"], self.model.max_positions)
            per_step, longest_rollout = min(data["traces_per_step"], num_traces(collect, self.assumptions)[0]), 0
        limit, on_rank = (
            arguments["max_tokens_per_micro_batch"],
            math.ceil(per_step * at.tensor_parallel / at.world_size),
        )
        accumulates = on_rank > 1 and on_rank * max(student, reads) > limit
        moments = training_moments(stage, config, self.model, teacher, at, max(limit, student), accumulates)
        self.found.moments += moments
        *passes, update = moments
        for moment in (max(passes, key=lambda passing: passing.total), update):  # one line for loss head and backward
            if self.gpu_bytes and at.on_gpu and moment.total > self.gpu_bytes:
                self._refuse(moment, _advice(moment, arguments, at, max(student, reads), self.gpu_bytes))
        kept = resident(self.model, teacher, at, arguments["student"])
        self._sample(stage, config, kept, at, longest_rollout)

    def _teacher(self, arguments: Mapping[str, Any]) -> tuple[Architecture, int]:
        """Sizes of the teacher, and the bytes of its elements: by default it is the student as it starts, and beside
        adapters the student's own weights."""
        named = arguments["teacher"]
        if named is None:
            return self.model, 0 if arguments["student"].get("lora") else 4
        sizes = load_architecture(named["path"], None)
        if sizes is None:
            self.found.notes.append(
                f"self_distill: the teacher at {named['path']} is taken to be of the student's size"
            )
        return sizes or self.model, 2 if named["dtype"] == "bfloat16" else 4

    def _refuse(self, moment: Moment, advice: str) -> None:
        assert self.gpu_bytes
        moments = {"loss": "training", "backward": "training", "update": "the optimizer's step", "rollout": "sampling"}
        self.found.refusals.append(
            f"{_file(moment.stage)}: {moments[moment.name]} of {moment.stage} needs {moment.total / GIB:.1f} GiB of a "
            f"GPU's {self.gpu_bytes / GIB:.1f}: {advice}"
        )


def _advice(moment: Moment, arguments: Mapping[str, Any], at: Machine, longest: int, gpu_bytes: int) -> str:
    """What brings it down: less in a micro batch where the rest fits, else less of each model on a GPU."""
    batch = sum(moment.parts.get(part, 0) for part in ("activations", "loss head"))
    if moment.total - batch < gpu_bytes:
        if not arguments["student"]["gradient_checkpointing"]:
            return "set model.student.gradient_checkpointing: true"
        if arguments["max_tokens_per_micro_batch"] > longest:
            return f"lower model.max_tokens_per_micro_batch; the longest example has {longest:,} tokens"
    if moment.parts["gradients"] > moment.parts["optimizer"] and not arguments["student"]["cpu_offload"]:  # whole
        return "set model.reduce_every_micro_batch: true, or take more GPUs (trainer.devices)"
    if at.num_shards == 1:
        return "shard the model over several GPUs: trainer.strategy (configs/trainer/fsdp2.yaml) and trainer.devices"
    if moment.parts["teacher"] and (arguments["teacher"] or {}).get("dtype") != "bfloat16":
        return "set model.teacher.dtype: bfloat16, or take more GPUs (trainer.devices)"
    return "take more GPUs (trainer.devices), lower sampling.max_new_tokens, or set model.student.cpu_offload: true"


def _file(stage: str) -> str:
    return "eval.yaml" if stage.endswith("/eval") else f"{stage}.yaml"


def _engine_spec(stage: str, config: Config) -> Mapping[str, Any] | None:
    return config["engine"] if stage == "collect" else config["data"]["init_args"].get("engine")


def differing(configs: Mapping[str, Config], assumptions: Assumptions) -> Iterator[str]:
    """Where plan.yaml says more than the recipe allows."""
    limits = {
        "mean_response_tokens": ("collect", configs.get("collect", {}).get("sampling")),
        "phase2_response_tokens": ("self_distill", configs["self_distill"]["data"]["init_args"]["sampling"]),
    }
    for name, (stage, sampling) in limits.items():
        said = getattr(assumptions, name)
        if sampling and said > (most := sampling["max_new_tokens"]):
            yield (
                f"{stage}: {name} of plan.yaml, {said:,}, is above sampling.max_new_tokens, {most:,}: no more than "
                f"{most / said:.1%} of the tokens above can come"
            )
