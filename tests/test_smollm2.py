"""The recipe smollm2, cut short, through its stages: a real model, its own tokenizer, vLLM, bfloat16."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pytest
from safetensors.torch import load_file

from runs import ROOT, read_json, rows, scalars, sdzero
from sdzero.prompts import PromptBuilder
from sdzero.types import Reason

RECIPE = ROOT / "configs/recipes/smollm2"
LIMIT = 0.3  # of the log-probability gap, the data modules' default: engine and trainer both compute in bfloat16
NUM_EVALUATED, NUM_STEPS = 6, 2


def stage(command: str, config: str, out: Path, **options: object) -> None:
    folder = {"out": out} if command == "collect" else {"trainer.default_root_dir": out}
    overrides = [f"--{key}={value}" for key, value in {**folder, **options}.items()]
    done = sdzero(command, "--config", RECIPE / f"{config}.yaml", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def out(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 questions, two steps of each phase, a few held-out questions."""
    out = tmp_path_factory.mktemp("smollm2")
    export_alone = "[{class_path: sdzero.callbacks.ExportModel}]"  # a checkpoint has 1.6 GB
    short = {"trainer.max_steps": NUM_STEPS, "trainer.callbacks": export_alone}
    stage(
        "collect",
        "collect",
        out / "collect",
        **{"model.path": smollm2, "num_questions": 16, "num_revisions": 2, "correct_share": "null"},
    )
    stage(
        "fit",
        "srt",
        out / "srt",
        **{"model.model.path": smollm2, "data.source.path": out / "collect/traces.jsonl", "data.traces_per_step": 2},
        **short,
    )
    stage(
        "fit",
        "self_distill",
        out / "self_distill",
        **{
            "model.model.path": out / "srt/model",
            "data.disjoint_from": out / "collect/questions.json",
            "data.prompts_per_step": 4,
            "data.sampling.max_new_tokens": 24,
        },
        **short,
    )
    stage(
        "test",
        "eval",
        out / "eval",
        **{
            "model.model.path": out / "self_distill/model",
            "data.evaluation.num_questions": NUM_EVALUATED,
            "data.evaluation.sampling.max_new_tokens": 40,
        },
    )
    return out


def test_verified_revisions_became_traces_of_the_models_own_tokens(out: Path, smollm2: Path) -> None:
    traces = rows(out / "collect/traces.jsonl")
    statistics = read_json(out / "collect/statistics.json")
    assert 0 < len(traces) == statistics["traces"] <= statistics["num_generations"] == 16 * 3
    builder = PromptBuilder.from_pretrained(smollm2)
    decode = builder.tokenizer.decode
    for trace in traces:
        assert decode(trace["prompt_ids"]).endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert trace["question"]["text"] in decode(trace["prompt_ids"])
        assert tuple(trace["bridge_ids"]) == builder.bridge(trace["reward"])
        assert decode(trace["revised_ids"]).rpartition("boxed{")[2].startswith(trace["question"]["answer"] + "}")


def test_both_phases_moved_the_weights(out: Path, smollm2: Path) -> None:
    before, srt, after = (
        load_file(p / "model.safetensors") for p in (smollm2, out / "srt/model", out / "self_distill/model")
    )
    assert before.keys() == srt.keys() == after.keys()
    for old, new in ((before, srt), (srt, after)):
        moved = {name: (new[name] - old[name]).abs().max().item() for name in old}
        assert all(0 < distance < 1e-3 for distance in moved.values()), moved


def test_the_engine_held_the_students_weights_at_every_step(out: Path) -> None:
    (gaps,) = scalars(out / "self_distill", "rollout/logprob_gap")
    assert [step for step, _ in gaps] == list(range(NUM_STEPS))
    assert all(0 < gap < LIMIT for _, gap in gaps)


def test_losses_are_finite_and_every_response_was_graded(out: Path) -> None:
    for phase in ("srt", "self_distill"):
        (losses,) = scalars(out / phase, "train/loss")
        assert len(losses) == NUM_STEPS and all(math.isfinite(loss) and loss > 0 for _, loss in losses)
    shares = [scalars(out / "self_distill", f"rollout/{reason}")[0] for reason in get_args(Reason)]
    assert [sum(share[step][1] for share in shares) for step in range(NUM_STEPS)] == pytest.approx([1, 1])
    rewards = read_json(out / "eval/rewards.json")
    assert len(rewards) == NUM_EVALUATED
    assert all(len(graded) == 2 and set(graded) <= {0, 1} for graded in rewards.values())
    accuracy = read_json(out / "eval/results.json")["eval/avg_at_k"]
    assert accuracy == pytest.approx(sum(map(sum, rewards.values())) / (2 * NUM_EVALUATED))
