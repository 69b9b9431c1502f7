"""An evaluation of a real model with vLLM that is killed in the middle of a generate call, and run again."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from runs import ROOT, environment, read_json, rows

NUM_QUESTIONS, NUM_SAMPLES, CALL_SIZE, MAX_NEW_TOKENS = 20, 8, 80, 24
KILLED_AFTER = 110  # responses: the first call and a part of the second

TEST = """
import os, signal, sys
from sdzero.cli import main
from sdzero.engines import VLLMEngine

asked, lives = sys.argv.pop(1), int(sys.argv.pop(1))
generate = VLLMEngine.generate

def noting(self, prompts, sampling, seed, policy_version, on_finished):
    def counting(place, rollout):
        global lives
        on_finished(place, rollout)
        lives -= 1
        if lives == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with open(asked, "a") as file:
        print(len(prompts), file=file)
    return generate(self, prompts, sampling, seed, policy_version, counting)

VLLMEngine.generate = noting
main()
"""
"""`sdzero ASKED LIVES test ...` notes the number of prompts of each call, and kills itself after LIVES responses."""


def config(model: Path, out: Path) -> dict[str, Any]:
    """The recipe's, whose worked examples have the model answer in a line, with fewer and shorter answers."""
    config = yaml.safe_load((ROOT / "configs/recipes/smollm2/eval.yaml").read_text())
    config["model"]["init_args"]["model"]["path"] = str(model)
    data = config["data"]["init_args"]
    data["engine"]["init_args"]["max_num_seqs"] = 32  # not all of a call at once: some end long before others
    data["evaluation"] = {
        "num_questions": NUM_QUESTIONS,
        "num_samples": NUM_SAMPLES,
        "sampling": {"temperature": 0.7, "max_new_tokens": MAX_NEW_TOKENS},
        "call_size": CALL_SIZE,
    }
    config["trainer"] |= {"default_root_dir": str(out), "callbacks": None}
    return config


@dataclass(frozen=True)
class Interrupted:
    """The folder of an evaluation after its end, what it had at the kill, and what its second run printed."""

    out: Path
    asked: list[int]
    whole: list[dict[str, Any]]
    partial: list[dict[str, Any]]
    said: str


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    folder = tmp_path_factory.mktemp("interrupted")
    out, asked = folder / "out", folder / "asked"
    (folder / "eval.yaml").write_text(yaml.safe_dump(config(smollm2, out)))

    def start(lives: int) -> subprocess.CompletedProcess[str]:
        arguments = [str(asked), str(lives), "test", "--config", str(folder / "eval.yaml")]
        options: dict[str, Any] = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
        return subprocess.run([sys.executable, "-c", TEST, *arguments], check=False, **options)

    killed = start(KILLED_AFTER)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    whole, partial = rows(journal(out, 0)), rows(out / "journal/rank0/call.partial")
    done = start(1_000_000)
    assert done.returncode == 0, done.stdout + done.stderr
    return Interrupted(out, list(map(int, asked.read_text().split())), whole, partial, done.stdout + done.stderr)


def journal(out: Path, call: int) -> Path:
    return out / f"journal/rank0/eval-000000-{call:05d}.jsonl"


def test_only_what_was_missing_was_asked_for_again(run: Interrupted) -> None:
    num_kept = KILLED_AFTER - CALL_SIZE
    assert len(run.partial) == num_kept
    assert run.asked == [CALL_SIZE, CALL_SIZE, CALL_SIZE - num_kept]
    assert f"{num_kept} of {CALL_SIZE} responses were made before a stop" in run.said


def test_finished_requests_are_untouched(run: Interrupted) -> None:
    assert rows(journal(run.out, 0)) == run.whole
    [row] = rows(journal(run.out, 1))
    assert len(row["responses"]) == CALL_SIZE
    for kept in run.partial:
        assert kept["fingerprint"] == row["fingerprint"]
        assert row["responses"][kept["place"]] == kept["response"]
    assert not (run.out / "journal/rank0/call.partial").exists()


def test_every_question_counts_once(run: Interrupted) -> None:
    rewards = read_json(run.out / "rewards.json")
    assert len(rewards) == NUM_QUESTIONS and all(len(graded) == NUM_SAMPLES for graded in rewards.values())
    responses = [r for call in (0, 1) for row in rows(journal(run.out, call)) for r in row["responses"]]
    assert [r["question"] for r in responses] == [question for question in rewards for _ in range(NUM_SAMPLES)]
    lengths = [len(r["token_ids"]) for r in responses]
    assert all(0 < length <= MAX_NEW_TOKENS for length in lengths) and all(any(r["logprobs"]) for r in responses)
    results = read_json(run.out / "results.json")
    assert 0 < results["eval/avg_at_k"] == pytest.approx(sum(map(sum, rewards.values())) / len(responses))
    assert results["eval/response_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    started = (run.out / "journal/rank0/calls.log").read_text().splitlines()
    assert started == ["eval-000000-00000 0", "eval-000000-00001 0"]
