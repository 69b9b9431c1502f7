"""Gloo ranks on the CPU do what one rank does: FSDP2 and tensor parallelism through FullShard, and DDP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from sdzero.tasks import Chains
from support.ranks.train_stored import ITEMS
from support.runs import ROOT, read_json, responses, rows, run_script
from support.tiny_model import write_tiny_model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp(min=1e-30))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of method_ranks.py, and what its callbacks wrote."""
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("trained")
    write_tiny_model(folder, tie_word_embeddings=False, num_key_value_heads=2)
    run_script("method_ranks.py", folder, out)
    return out


STRATEGIES = ("offloaded", "fsdp2", "reduced", "ddp", "tp", "fsdp2_tp")


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        *((kind, strategy) for kind in ("srt", "self_distill") for strategy in STRATEGIES),
        *(("policy_gradient", strategy) for strategy in ("fsdp2", "tp")),
    ],
)
def test_several_ranks_equal_one(kind: str, strategy: str, trained: Path) -> None:
    """Float32, SGD, clipping, uneven shares, a share without rows, several micro batches."""
    one, several = (torch.load(trained / f"{kind}-{name}.pt") for name in ("one", strategy))
    for step, (ours, theirs) in enumerate(zip(one["gradients"], several["gradients"], strict=True)):
        assert max(map(relative, ours, theirs)) < 1e-5, step
    assert one["weights"].keys() == several["weights"].keys()
    assert max(relative(w, several["weights"][name]) for name, w in one["weights"].items()) < 1e-5
    for step, (ours, theirs) in enumerate(zip(one["losses"], several["losses"], strict=True)):  # reduced over the ranks
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[k], theirs[k], rtol=1e-4, atol=1e-6, equal_nan=True) for k in ours), step
        if kind == "self_distill":
            assert theirs.keys() >= {"rollout/keywords_per_response", "rollout/length_p50", "rollout/copy_rate"}
    if strategy == "ddp":
        assert several["num_sent"] == several["num_of_student"], "the teacher is not sent"
    if strategy == "reduced":  # each micro batch's gradients, not a step's
        once = torch.load(trained / f"{kind}-fsdp2.pt")["num_reduced"]
        assert several["num_reduced"] > once == 3 * len(ITEMS)  # two layers and the root
    if strategy == "fsdp2":  # embedding and head once a step, the teacher's once for good; layers every time
        root = min(size for step in several["gathers"] for size in step)
        assert [step.count(root) for step in several["gathers"][:-1]] == [1 + (kind != "srt"), 1, 1]
        assert len(several["gathers"][0]) > len(several["gathers"][2])  # it had more micro batches


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp", "tp", "fsdp2_tp"])
def test_every_response_is_written_once(strategy: str, trained: Path) -> None:
    """Ranks that compute a batch together have the same responses: one of them writes."""
    folders = [trained / f"self_distill-{name}" for name in ("one", strategy)]
    samples = [[row for file in sorted(f.glob("samples/*.jsonl")) for row in rows(file)] for f in folders]
    alone, shared = (sorted((row["step"], row["question"]) for row in written) for written in samples)
    assert alone == shared and len(shared) == sum(ITEMS)
    alone, shared = (pd.concat(map(pd.read_parquet, f.glob("token_kl/*.parquet"))) for f in folders)
    alone, shared = (t.sort_values(["step", "question"]).reset_index() for t in (alone, shared))
    assert list(alone.question) == list(shared.question) and len(alone) == sum(ITEMS)
    for ours, theirs in zip(alone.kl, shared.kl, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def recipes(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of recipe_ranks.py: the engines are real ones, and each rank has its own."""
    out = tmp_path_factory.mktemp("recipes")
    run_script("recipe_ranks.py", smoke_run, out)
    return out


@pytest.mark.parametrize("strategy", ["ddp", "tp"])
def test_a_recipe_on_two_ranks_counts_and_writes_once(strategy: str, recipes: Path) -> None:
    """Steps of three questions and of one, an evaluation of three: nothing divides by two."""
    run = recipes / strategy
    evaluated = sorted(read_json(run / "self_distill/questions-fit.json")["eval"])
    assert len(evaluated) == 3
    num_tokens = 0  # of the last stage's
    for stage in ("srt", "self_distill", "eval"):
        journals = [run / stage / f"journal/rank{rank}" for rank in (0, 1)]
        answers = [responses(journal, "eval") for journal in journals]
        assert all(answers), "both engines sampled"
        assert sorted(answer["question"] for answer in answers[0] + answers[1]) == sorted(2 * evaluated)
        num_tokens = sum(len(answer["token_ids"]) for answer in answers[0] + answers[1])
        assert len([*(run / stage).glob("events*")]) == 1
        kept = [row["question"] for file in (run / stage / "samples").glob("eval-*") for row in rows(file)]
        assert sorted(kept) == evaluated
    for stage, num_generations in (("srt", 0), ("self_distill", 3 + 1)):
        manifest = read_json(run / stage / "model/sdzero.json")
        assert (manifest["num_generations"], manifest["policy_version"]) == (num_generations, 2)
    trained = [row["question"] for file in (run / "self_distill/samples").glob("train-*") for row in rows(file)]
    assert len(trained) == len({*trained}) == 3
    rewards, results = (read_json(run / f"eval/{name}.json") for name in ("rewards", "results"))
    in_order = [question.id for question in Chains(min_ops=1, max_ops=2).questions("eval", 3)]
    assert [*rewards] == in_order and sorted(in_order) == evaluated
    assert all(len(of_question) == 2 for of_question in rewards.values())
    assert results["eval/avg_at_k"] == pytest.approx(sum(map(sum, rewards.values())) / 6)
    assert results["eval/response_tokens"] == pytest.approx(num_tokens / 6)


def test_metrics_of_a_benchmark_of_which_a_rank_has_no_question(trained: Path) -> None:
    """Ranks that compute together have the same answers, which count once."""
    one, ddp, tp = (torch.load(trained / f"evaluate-{name}.pt") for name in ("one", "ddp", "tp"))
    benchmarks = [{question.split("/")[0] for question in questions} for questions in (*ddp["asked"], *tp["asked"])]
    assert benchmarks == [{"x", "y"}, {"x", "z"}, {"x", "y", "z"}, {"x", "y", "z"}]
    ours = one["metrics"]
    assert ours.keys() >= {"eval/avg_at_k", "eval/y/avg_at_k", "eval/z/pass_at_2", "eval/x/truncated"}
    for theirs in (ddp["metrics"], tp["metrics"]):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name].nan_to_num(-1), theirs[name].nan_to_num(-1)) for name in ours)
    assert (ours["eval/x/avg_at_k"], ours["eval/x/truncated"], ours["eval/z/avg_at_k"]) == (0.25, 0.25, 1)
    assert ours["eval/x/avg_at_k_se"] > 0.2, "more of the same answers would lower it"


def test_fsdp1_shards_and_synchronises_the_teacher(trained: Path) -> None:
    """The models' part under FSDPStrategy: wrapping, clipping, gathering, and an EMA and a copy of the teacher."""
    one, two = (torch.load(trained / f"fsdp1-{num}.pt") for num in (1, 2))
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["norms"] == pytest.approx(two["norms"], rel=1e-5)
    for model in ("student", "teacher"):
        assert max(relative(w, two[model][name]) for name, w in one[model].items()) < 1e-5
    assert any(relative(w, one["teacher"][name]) > 1e-4 for name, w in one["student"].items())


def test_three_steps_with_a_vllm_engine_in_each_rank(smoke_run: Path, tmp_path: Path) -> None:
    """Gather, reload, generate, reward, distil, save sharded, export."""
    overlays = ["recipes/smoke/self_distill", "engines/vllm_cpu", "trainer/fsdp2"]
    line = [sys.executable, "-m", "sdzero", "fit"]
    line += [part for overlay in overlays for part in ("--config", f"configs/{overlay}.yaml")]
    line += [
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.precision=32-true",
        "--trainer.max_steps=3",
        f"--trainer.default_root_dir={tmp_path}",
        f"--model.student.path={smoke_run / 'srt/model'}",
        f"--data.disjoint_from={smoke_run / 'collect/questions.json'}",
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model/model.safetensors").is_file()
    for rank in (0, 1):
        calls = (tmp_path / f"journal/rank{rank}/calls.log").read_text().split("\n")[:-1]
        groups = [*(f"train-{step:06d}" for step in range(3)), "eval-000003-00000", "revise-000003-00000"]
        assert calls == [f"{group} 0" for group in groups]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
