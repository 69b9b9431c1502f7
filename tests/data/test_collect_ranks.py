"""Collection over gloo ranks is that of one process, also after a rank's end."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed as dist

from sdzero.data.collect import Collect
from sdzero.data.launch import launch
from sdzero.engines import ScriptedEngine
from sdzero.engines.base import EngineDied, EngineError, EngineSpec
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.tasks import Chains
from sdzero.types import Prompt, Rollout, Sampling
from support.ranks.forked import forked
from support.runs import ROOT, read_json, rows

QUESTIONS, CALL_SIZE = 23, 4  # six chunks, the last one short


class Actor(ScriptedEngine):
    """Samples right, wrong and cut answers as an engine does: from the call's seed and its other prompts.

    Above 1, `tensor_parallel_size` neighbouring ranks sample together: every call needs all of them.
    """

    def __init__(self, tensor_parallel_size: int = 1, ends: tuple[int, str] | None = None) -> None:
        super().__init__(lambda prompt, seed: self.answers[prompt.question.id].pop())
        self.tensor_parallel_size = tensor_parallel_size
        self.ends = ends  # in which call, and how

    def start(self, spec: EngineSpec, builder: PromptBuilder) -> None:
        super().start(spec, builder)
        if self.tensor_parallel_size > 1:
            self.group, _ = dist.new_subgroups(self.tensor_parallel_size)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, policy_version: int, *rest: Any, **more: Any
    ) -> list[Rollout]:
        if self.ends is not None and self.num_generate_calls + 1 == self.ends[0]:
            if self.ends[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.ends[1] == "dies":
                self.ends = None
                raise EngineDied("it died")
            raise EngineError("the engine died")
        questions_of_call = [prompt.question for prompt in prompts]
        if self.tensor_parallel_size > 1:
            gathered: list[Any] = [None] * self.tensor_parallel_size
            dist.all_gather_object(gathered, (questions_of_call, seed), group=self.group)
            questions_of_call, seed = [question for questions, _ in gathered for question in questions], gathered[0][1]
        rng, self.answers = random.Random(seed), {}
        for question in questions_of_call:
            right = rng.random() < 0.5
            answer = f"1+1=2A{(int(question.answer) + (not right)) % 10}{'111111' * (rng.random() < 0.1)}"
            self.answers.setdefault(question.id, []).insert(0, answer)
        return super().generate(prompts, sampling, seed, policy_version, *rest, **more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = shutil.copytree(ROOT / "configs/tiny_model", tmp_path_factory.mktemp("model") / "model")
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    return ModelConfig(str(folder))


def collect(model: ModelConfig, out: Path, engine: Actor, **options: Any) -> None:
    settings: dict[str, Any] = {"num_questions": QUESTIONS, "num_traces": 20, "call_size": CALL_SIZE, **options}
    Collect(model, Chains(), engine, out, sampling=Sampling(0.7, 1.0, 12), **settings).run()


@pytest.fixture(scope="module")
def alone(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of one process."""
    out = tmp_path_factory.mktemp("alone")
    collect(model, out, Actor())
    rewards = Counter(row["reward"] for row in rows(out / "traces.jsonl"))
    assert rewards[0] > 3 and rewards[1] > 3
    return out


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("traces.jsonl", "questions.json", "statistics.json")}


def collect_on(num_ranks: int, model: ModelConfig, out: Path, **options: Any) -> tuple[list[int], str]:
    """Return exit codes and the log. `ends` is rank 1's."""
    size, ends = options.pop("tensor_parallel_size", 1), options.pop("ends", None)
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)

    def work(rank: int) -> None:
        sys.stdout = sys.stderr = log.open("a", buffering=1)  # pytest's stand-ins are the parent's
        logging.basicConfig(stream=sys.stderr, force=True)
        collect(model, out, Actor(size, ends if rank == 1 else None), devices=num_ranks, **options)

    codes = forked(num_ranks, log, work)
    return codes, log.read_text()


@pytest.mark.parametrize(("num_ranks", "tensor_parallel_size"), [(2, 1), (4, 1), (2, 2), (4, 2)], ids=str)
def test_ranks_write_what_one_process_writes(
    num_ranks: int, tensor_parallel_size: int, model: ModelConfig, alone: Path, tmp_path: Path
) -> None:
    """Four ranks have two chunks or one of the six; of ranks that share an engine one has the prompts."""
    out = tmp_path / "out"
    codes, log_text = collect_on(num_ranks, model, out, tensor_parallel_size=tensor_parallel_size)
    assert codes == [0] * num_ranks, log_text
    assert files(out) == files(alone)
    num_engines = num_ranks // tensor_parallel_size
    for engine in range(num_engines):
        log = "calls.log" if engine == 0 else f"calls-{engine * tensor_parallel_size}.log"
        groups = {line.split()[0] for line in (out / "journal" / log).read_text().splitlines()}
        chunks = range(engine, 6, num_engines)
        assert groups == {f"{chunk:05d}-{kind}" for chunk in chunks for kind in ("initial", "revision")}
    assert log_text.count('"num_generations"') == 1 and "nothing to do" not in log_text


def test_fewer_chunks_than_ranks(model: ModelConfig, tmp_path: Path) -> None:
    out, one = tmp_path / "out", tmp_path / "one"
    collect(model, one, Actor(), call_size=16)
    codes, log_text = collect_on(3, model, out, call_size=16)
    assert codes == [0, 0, 0], log_text
    assert files(out) == files(one)
    assert "23 questions are 2 chunks of at most 16, so 1 of 3 engines have nothing to do" in log_text


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_rank_that_ends_ends_the_others_and_another_number_of_ranks_resumes(
    how: str, model: ModelConfig, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    codes, _ = collect_on(2, model, out, ends=(6, how))
    assert codes == [1, -signal.SIGKILL if how == "killed" else 1]
    assert not (out / "traces.jsonl").exists()
    engine = Actor()
    collect(model, out, engine)
    assert engine.num_generate_calls == 24 - 12 - 5, "rank 0 had made its three chunks, rank 1 five calls"
    assert (out / "traces.jsonl").read_bytes() == (alone / "traces.jsonl").read_bytes()
    assert read_json(out / "statistics.json") == {**read_json(alone / "statistics.json"), "engine_calls": 24 + 1}


@pytest.mark.parametrize("starts_collectively", [False, True])
def test_an_engine_with_a_collective_start_is_not_restarted(
    starts_collectively: bool, model: ModelConfig, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(Actor, "starts_collectively", starts_collectively)
    codes, log_text = collect_on(2, model, out, ends=(6, "dies"))
    if starts_collectively:
        assert codes == [1, 1] and "EngineDied: it died" in log_text and "restart 1 of" not in log_text
    else:
        assert codes == [0, 0] and "restart 1 of at most 2" in log_text
        assert (out / "traces.jsonl").read_bytes() == (alone / "traces.jsonl").read_bytes()


def test_ranks_resume_what_one_process_began(model: ModelConfig, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(EngineError):
        collect(model, out, Actor(ends=(7, "raises")))
    codes, log_text = collect_on(3, model, out)
    assert codes == [0, 0, 0], log_text
    assert (out / "traces.jsonl").read_bytes() == (alone / "traces.jsonl").read_bytes()
    assert read_json(out / "statistics.json") == {**read_json(alone / "statistics.json"), "engine_calls": 24 + 1}


def test_no_trace_is_reported_once(model: ModelConfig, tmp_path: Path) -> None:
    codes, log_text = collect_on(2, model, tmp_path / "out", num_questions=6, correct_share=1.0, branches="incorrect")
    assert codes == [1, 0] and log_text.count("ValueError: no trace was left") == 1


def test_an_engine_larger_than_the_job_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine\.tensor_parallel_size 2 must divide .*, which is 3: .*\(devices"):
        collect(model, tmp_path / "out", Actor(2), devices=3)
    assert not (tmp_path / "out").exists()


def test_more_processes_than_configured_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun with other numbers than the config: each process would act as the only one."""
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "0", "GROUP_RANK": "0"}
    for name, value in {**started, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"devices=1.*num_nodes=1.*does not match the world size \(2\)"):
        launch(1, 1, 1)
