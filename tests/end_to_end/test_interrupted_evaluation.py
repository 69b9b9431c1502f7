"""An evaluation with vLLM that is killed in the middle of a generate call, and run again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdzero.utils.recipe import load_recipe
from support.runs import ROOT, SMOKE, environment, once, read_json, rows

NUM_QUESTIONS, NUM_SAMPLES, CALL_SIZE, MAX_NEW_TOKENS = 20, 8, 80, 24
KILLED_AT = 16  # steps of the second call: some responses are finished, some unfinished, some not started

TEST = """
import os, signal, sys
from sdzero.cli.main import main
from sdzero.engines import VLLMEngine

counts, killed_at = sys.argv.pop(1), int(sys.argv.pop(1))
generate, calls = VLLMEngine.generate, 0

def counted(self, prompts, sampling, seed, policy_version, on_tokens, partials):
    global calls
    calls += 1
    steps = []

    def count(pieces):
        on_tokens(pieces)
        steps.append(sum(len(piece.token_ids) for piece in pieces.values()))
        if (calls, len(steps)) == (2, killed_at):
            os.kill(os.getpid(), signal.SIGKILL)

    rollouts = generate(self, prompts, sampling, seed, policy_version, count, partials)
    with open(counts, "a") as file:
        print(sum(steps), file=file)
    return rollouts

VLLMEngine.generate = counted
main()
"""
"""Arguments COUNTS STEP test ...: append each call's number of tokens to COUNTS; be killed at a STEP of the second."""


def config(model: Path, out: Path) -> dict[str, Any]:
    """Return the smoke recipe's evaluation with vLLM, and with fewer answers at once than a call has."""
    config, _ = load_recipe(SMOKE).compose(None)
    config["model"]["init_args"] = {"student": {"path": str(model)}}
    data = config["data"]["init_args"]
    data["engine"] = {"class_path": "sdzero.engines.VLLMEngine", "init_args": {"max_num_seqs": 32}}
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
    """Folder of the finished evaluation, the journal at the kill, and the output of the second run."""

    out: Path
    num_tokens: list[int]
    first: list[dict[str, Any]]
    partial: list[dict[str, Any]]
    output: str

    def kept(self) -> dict[int, tuple[list[int], list[float]]]:
        """Return the tokens and log-probabilities on disk at the kill, by place in the second call."""
        kept: dict[int, tuple[list[int], list[float]]] = {}
        for step in self.partial[1:]:
            for place, (token_ids, logprobs) in step.items():
                ids, values = kept.setdefault(int(place), ([], []))
                ids += token_ids
                values += logprobs
        return kept


@pytest.fixture(scope="module")
def run(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    folder = once(tmp_path_factory, "interrupted", lambda folder: interrupt(smoke_run / "base/model", folder))
    num_tokens = [int(num) for num in (folder / "counts").read_text().split()]
    output = (folder / "output").read_text()
    return Interrupted(folder / "out", num_tokens, rows(folder / "first"), rows(folder / "partial"), output)


def interrupt(model: Path, folder: Path) -> None:
    folder.mkdir()
    out = folder / "out"
    (folder / "eval.yaml").write_text(yaml.safe_dump(config(model, out)))

    def start(killed_at: int) -> subprocess.CompletedProcess[str]:
        arguments = [str(folder / "counts"), str(killed_at), "test", "--config", str(folder / "eval.yaml")]
        options: dict[str, Any] = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
        return subprocess.run([sys.executable, "-c", TEST, *arguments], check=False, **options)

    killed = start(KILLED_AT)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    shutil.copy(journal(out, 0), folder / "first")
    shutil.copy(journal(out, 1).with_suffix(".partial"), folder / "partial")
    done = start(0)
    (folder / "output").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr


def journal(out: Path, call: int) -> Path:
    return out / f"journal/rank0/eval-000000-{call:05d}.jsonl"


def count_tokens(responses: list[dict[str, Any]]) -> int:
    return sum(len(response["token_ids"]) for response in responses)


def test_only_missing_tokens_were_sampled(run: Interrupted) -> None:
    num_kept = sum(len(token_ids) for token_ids, _ in run.kept().values())
    [first], [second] = run.first, rows(journal(run.out, 1))
    assert 0 < num_kept < count_tokens(second["responses"])
    assert run.num_tokens == [count_tokens(first["responses"]), count_tokens(second["responses"]) - num_kept]
    assert f"call 0: continues from {num_kept} tokens before an interruption" in run.output


def test_responses_continue_from_the_journal_and_finished_ones_are_unchanged(run: Interrupted) -> None:
    assert rows(journal(run.out, 0)) == run.first
    [row] = rows(journal(run.out, 1))
    assert len(row["responses"]) == CALL_SIZE and run.partial[0] == {"fingerprint": row["fingerprint"]}
    num_longer = 0
    for place, (token_ids, logprobs) in run.kept().items():
        response = row["responses"][place]
        assert response["token_ids"][: len(token_ids)] == token_ids
        assert response["logprobs"][: len(logprobs)] == logprobs
        num_longer += len(response["token_ids"]) > len(token_ids)
    assert 0 < num_longer < len(run.kept()) < CALL_SIZE  # unfinished, finished and not started
    assert not [*(run.out / "journal/rank0").glob("*.partial")]


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
