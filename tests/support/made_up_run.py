"""Made-up run folders for tests: the files of callbacks and stages, with chosen texts and values."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.tensorboard.writer import SummaryWriter

from sdzero.utils.lineage import Lineage, Outline
from sdzero.utils.recipe import StageEntry

HOSTILE = (
    "<script>pwned = 1</script>",
    "</script><script>pwned = 2</script>",
    "--><!--<img src=x onerror='pwned = 3'>",
    '"\'><svg onload="pwned = 4">{{ 7 * 7 }}&amp;</code></p></section>',
)


def stage(name: str, label: str = "", starts_from: str | None = None, command: str = "fit", **takes: str) -> StageEntry:
    return StageEntry(name, command, f"{name}.yaml", label or name, starts_from, takes)


PAPER = (
    stage("base"),
    stage("collect", command="collect"),
    stage("srt", "SRT", "base", path="collect/traces.jsonl"),
    stage("self_distill", "SD-Zero", "srt"),
)
"""Stages of the paper's method."""
MODELS = tuple(entry.name for entry in PAPER if entry.has_model)

THREE_METHODS = (stage("base"), *(stage(name, name.upper(), "base") for name in ("sft", "rft", "sdft")))
"""Three methods that start from the same model."""


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lineage(run: Path, stages: Sequence[StageEntry] = PAPER, records: Mapping[str, Any] | None = None) -> None:
    """A run of these stages; `records` are those that have started."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "lineage.json").write_text(Lineage(Outline("made_up", tuple(stages)), dict(records or {})).to_json())


def write_curves(folder: Path, curves: Mapping[str, list[float] | dict[int, float]]) -> None:
    """TensorBoard curves of a stage by tag: one value per step, or values by step."""
    with SummaryWriter(folder) as writer:
        for tag, values in curves.items():
            for step, value in values.items() if isinstance(values, dict) else enumerate(values):
                writer.add_scalar(tag, value, step)


def token_kl_row(
    rng: random.Random, tokens: list[str], reward: int, step: int = 0, question: str = "q"
) -> dict[str, Any]:
    """A row as TokenKLRecorder writes it; the teacher often disagrees with the student."""
    num = len(tokens)
    student, teacher = ([rng.uniform(0.2, 0.8) for _ in range(num)] for _ in range(2))
    others = [[f"other{t}", "<i>it</i>"] for t in range(num)]
    return {
        "step": step,
        "question": question,
        "text": f"What is {question}?",
        "answer": "42",
        "response": "".join(tokens),
        "reward": reward,
        "reason": "correct" if reward else "wrong",
        "token_ids": list(range(num)),
        "tokens": tokens,
        "kl": [rng.expovariate(2) for _ in range(num)],
        "token_kl_reward": [math.log(s / t) for s, t in zip(student, teacher, strict=True)],
        "student_logprob": [math.log(p) for p in student],
        "teacher_logprob": [math.log(p) for p in teacher],
        "student_top": [[token, *other] for token, other in zip(tokens, others, strict=True)],
        "student_top_prob": [[p, (1 - p) / 2, (1 - p) / 4] for p in student],
        "teacher_top": others,
        "teacher_top_prob": [[(1 - p) / 2, (1 - p) / 4] for p in teacher],
    }


def write_token_kl(run: Path, rows: list[dict[str, Any]], stage: str = "self_distill") -> None:
    folder = run / stage / "token_kl"
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / "train-000000-rank0.parquet")


def sample_row(question: str, response: str, reward: int = 0, revision: str | None = None) -> dict[str, Any]:
    """A row as SampleWriter writes it."""
    judged = {"response": response, "reward": reward, "reason": "correct" if reward else "wrong", "num_tokens": 7}
    revised = None if revision is None else {**judged, "response": revision, "reward": 1, "reason": "correct"}
    about = {"step": 0, "question": question, "sample": 0, "text": f"What is {question}?", "answer": "42"}
    return {**about, **judged, "parsed": None if reward else "41", "finish_reason": "stop", "revision": revised}


def write_samples(run: Path, model: str, rows: list[dict[str, Any]]) -> None:
    folder = run / model / "eval/samples"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval-000000-rank0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(run: Path, model: str, rewards: dict[str, list[int]], **more: float | None) -> None:
    """An evaluation's files, with made-up standard errors."""
    every = [r for answers in rewards.values() for r in answers]
    k = len(next(iter(rewards.values())))
    metrics = {
        "eval/avg_at_k": sum(every) / len(every),
        "eval/avg_at_k_se": 0.01,
        f"eval/pass_at_{k}": sum(map(max, rewards.values())) / len(rewards),
        f"eval/pass_at_{k}_se": 0.02,
        "eval/response_tokens": 30.0,
        "eval/keywords_per_response": 0.5,
    }
    write_json(run / model / "eval/results.json", {**metrics, **more})
    write_json(run / model / "eval/rewards.json", rewards)


def write_run_of(run: Path, texts: tuple[str, ...]) -> None:
    """A run with these texts wherever a model, a task or a config can write text."""
    rng = random.Random(0)
    record = {"config": {"student.path": texts[0], texts[1]: texts[1]}, "inputs": {"a": texts[2]}, "spent": 1.0}
    write_lineage(run, records={"srt": record})
    write_token_kl(run, [{**token_kl_row(rng, [*texts], i % 2, 0, t), "reason": t} for i, t in enumerate(texts)])
    for model in MODELS:
        write_samples(run, model, [sample_row(t, t, i % 2, revision=t) for i, t in enumerate(texts)])
        write_evaluation(run, model, {t: [0, 1] for t in texts})
