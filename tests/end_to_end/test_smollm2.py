"""All stages of a shortened smollm2 recipe: a real model, its own tokenizer, vLLM, bfloat16."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file

from sdzero.prompts import PromptBuilder
from sdzero.types import Reason
from support.runs import ROOT, environment, read_json, rows, scalars

RECIPE = ROOT / "configs/recipes/smollm2"
LIMIT = 0.3  # of the log-probability gap, the data modules' default: the second phase's engine computes in bfloat16
NUM_ASKED, NUM_EVALUATED, NUM_STEPS = 8, 2, 2


STAGES = """
import json, sys
from sdzero.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["sdzero", *arguments]
    main()
"""


def stage(command: str, config: str, **options: object) -> list[str]:
    overrides = (f"--{key}={value}" for key, value in options.items())
    return [command, "--config", str(RECIPE / f"{config}.yaml"), *overrides]


@pytest.fixture(scope="module")
def out(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run eight questions, two steps of each phase and a small evaluation, in one process that imports vLLM once."""
    out = tmp_path_factory.mktemp("smollm2")
    short = {
        "trainer.max_steps": NUM_STEPS,
        "trainer.precision": "32-true",  # a CPU without bfloat16 instructions takes minutes per step in bf16-mixed
        "trainer.callbacks": "[{class_path: sdzero.callbacks.ExportModel}]",
        "trainer.enable_checkpointing": "false",  # each would have 1.6 GB
    }
    collect = {"out": out / "collect", "student.path": smollm2}
    collect |= {"num_questions": NUM_ASKED, "num_revisions": 2, "correct_share": "null", "engine_dtype": "float32"}
    srt = {"trainer.default_root_dir": out / "srt", "model.student.path": smollm2, **short}
    srt |= {"data.source.path": out / "collect/traces.jsonl", "data.traces_per_step": 2}
    distill = {"trainer.default_root_dir": out / "self_distill", "model.student.path": out / "srt/model", **short}
    distill |= {"data.disjoint_from": out / "collect/questions.json", "data.prompts_per_step": 1}
    distill |= {"data.sampling.max_new_tokens": 24}
    test = {"trainer.default_root_dir": out / "eval", "model.student.path": out / "self_distill/model"}
    test |= {
        "data.engine_dtype": "float32",
        "data.evaluation.num_questions": NUM_EVALUATED,
        "data.evaluation.sampling.max_new_tokens": 40,
    }
    stages = [
        stage("collect", "collect", **collect),
        stage("fit", "srt", **srt),
        stage("fit", "self_distill", **distill),
        stage("test", "eval", **test),
    ]
    options: dict[str, Any] = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", STAGES, json.dumps(stages)], check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_verified_revisions_became_traces_of_the_models_own_tokens(out: Path, smollm2: Path) -> None:
    traces = rows(out / "collect/traces.jsonl")
    statistics = read_json(out / "collect/statistics.json")
    assert 0 < len(traces) == statistics["traces"] <= statistics["num_generations"] == NUM_ASKED * 3
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
