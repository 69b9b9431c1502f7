"""The readable twin `notebooks/sd_zero_loop.py` computes what the package computes on the same rollouts, and runs."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from notebooks import sd_zero_loop as loop
from sdzero.data.collect import Collect
from sdzero.data.trace_file import read_traces
from sdzero.engines import ScriptedEngine
from sdzero.methods import SRT, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.tasks import Chains
from sdzero.types import Question, Sampling, ScoredRollout, Trace, TraceBatch
from support.helpers import Steps, fit, make_batch, make_scored
from support.runs import ROOT, environment

TASK = Chains(min_ops=1, max_ops=2)
QUESTIONS = TASK.questions("phase1", 12)
STEP: dict[str, Any] = {
    "optimizer": lambda p: torch.optim.SGD(p, lr=0.0),
    "max_grad_norm": 0,
    "max_tokens_per_micro_batch": 300,
}


class Answers:
    """Right, wrong, unreadable and overlong responses, by the prompt's text and how often it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def __call__(self, prompt: str) -> str:
        self.asked[prompt] += 1
        question = next(q for q in QUESTIONS if prompt.startswith(q.text))
        rng = random.Random(f"{prompt} {self.asked[prompt]}")
        wrong = (int(question.answer) + 1) % 10
        choices = [f"{question.text}{question.answer}A{question.answer}", f"{question.text}{wrong}A{wrong}", "1+1="]
        return rng.choice([choices[0], *choices, "9" * 70 + f"A{question.answer}"])


class Float64(L.Callback):
    """Computes in float64, so that the order of sums does not show."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.double()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random models of the tiny configuration: student and teacher."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        folders.append(tmp_path_factory.mktemp("model"))
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(loop.MODEL)).save_pretrained(folders[-1])
        loop.tokenizer.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def traces(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    """D_revision of the package."""
    answers, out = Answers(), tmp_path_factory.mktemp("collect")
    engine = ScriptedEngine(lambda prompt, seed: answers(loop.tokenizer.decode(prompt.token_ids)))
    sampling = Sampling(max_new_tokens=loop.MAX_NEW_TOKENS)
    Collect(ModelConfig(str(paths[0])), TASK, engine, out, len(QUESTIONS), num_traces=None, sampling=sampling).run()
    return read_traces(out / "traces.jsonl")


def of_loop(trace: Trace) -> loop.Trace:
    assert trace.reward is not None
    return loop.Trace(trace.prompt_ids, trace.init_ids, trace.bridge_ids, trace.revised_ids, trace.reward)


def check_step(steps: Steps, loss: torch.Tensor, model: Any) -> None:
    """Compare loss and gradients of the package's step with those of the loop."""
    assert steps.metrics[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == steps.gradients[0].keys()
    for name, gradient in steps.gradients[0].items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=2e-6)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def test_d_revision_has_the_same_rows(traces: list[Trace]) -> None:
    answers = Answers()

    def sampler(prompts: list[loop.Ids]) -> list[loop.Ids]:
        texts = [answers(loop.tokenizer.decode(prompt)) for prompt in prompts]
        return [(*loop.encode(text), loop.END)[: loop.MAX_NEW_TOKENS] for text in texts]

    rows, first = loop.collect(sampler, [loop.Question(q.text, q.answer) for q in QUESTIONS])
    assert rows == [of_loop(trace) for trace in traces]
    assert {row.reward for row in rows} == {0, 1}
    assert len(first) == len(QUESTIONS)


def test_srt_has_the_same_loss_and_gradients(paths: list[Path], traces: list[Trace], tmp_path: Path) -> None:
    steps = fit(SRT(ModelConfig(str(paths[0])), **STEP), [TraceBatch(traces, 0)], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(paths[0], dtype=torch.float32)
    check_step(steps, loop.srt_loss(model, [of_loop(trace) for trace in traces]), model)


def test_self_distill_has_the_same_loss_and_gradients(paths: list[Path], tmp_path: Path) -> None:
    builder, answers = PromptBuilder.from_pretrained(paths[0]), Answers()

    def scored(question: Question) -> ScoredRollout:
        text = answers(question.text)
        return make_scored(builder, question, text, TASK.verify(question, text).reward, cut=len(text) > 60)

    batch = [scored(question) for question in QUESTIONS]
    method = SelfDistill(ModelConfig(str(paths[0])), teacher=ModelConfig(str(paths[1])), **STEP)
    steps = fit(method, [make_batch(batch)], tmp_path, Float64())
    rollouts = [
        loop.Rollout(loop.Question(q.text, q.answer), s.rollout.prompt.token_ids, s.rollout.token_ids, s.verdict.reward)
        for s, q in zip(batch, QUESTIONS, strict=True)
    ]
    assert {rollout.reward for rollout in rollouts} == {0, 1}
    student = load(paths[0])
    check_step(steps, loop.self_distill_loss(student, load(paths[1]), rollouts), student)


def test_questions_are_verified_alike() -> None:
    for question, (mine, document) in zip(QUESTIONS, loop.stream(random.Random(0)), strict=False):
        theirs = Question("chains/x", mine.text, mine.answer)
        for response in (document, f"A{mine.answer} ", "A", "", f"A{question.answer}A"):
            assert loop.verify(mine, response) == TASK.verify(theirs, response).reward


def test_the_script_runs_to_its_end(tmp_path: Path) -> None:
    script = [sys.executable, ROOT / "notebooks/sd_zero_loop.py", "--scale", "0.5"]
    done = subprocess.run(script, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["base", "collect", "SRT", "SelfDistill"]
    assert "steps, loss" in done.stdout and "nan" not in done.stdout
