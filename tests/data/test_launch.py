"""Launch scripts of configs/scripts, with two processes on this machine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdzero.cli.stage_commands import check_stage
from sdzero.pipeline import run as pipeline
from sdzero.pipeline.stages import Options, list_stages
from sdzero.utils.recipe import load_recipe
from support.runs import ROOT, SMOKE, environment, read_json, records, scalars

CLUSTER = ROOT / "configs/scripts"
SRUN = """#!/bin/bash
# Runs the command once per task with its rank, as SLURM's srun does on one node.
echo "srun $*" >> "$SRUN_LOG"
while [[ $1 == -* ]]; do shift; done
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
"""


def bash(script: str, *arguments: str | Path, programs: Path = ROOT, cwd: Path = ROOT, **variables: str) -> str:
    """Output of a script of configs/scripts. It finds `programs` first, then those of this interpreter."""
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(CLUSTER / script), *map(str, arguments)]
    variables = environment(PATH=path, **variables)
    options: dict[str, Any] = {"cwd": cwd, "env": variables, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_a_script_parses_and_prints_its_usage(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "usage:" in done.stderr


def test_slurm_collects_on_two_ranks_what_one_collected(smoke_run: Path, tmp_path: Path) -> None:
    """Bit for bit, so that the stages after it, made by one process, stay finished."""
    out = shutil.copytree(smoke_run, tmp_path / "out")
    shutil.rmtree(out / "collect")
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin/srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "sdzero", "SLURM_NNODES": "1", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "1", "SLURM_NODELIST": "localhost"}
    slurm |= {"SRUN_LOG": str(tmp_path / "log")}
    output = bash("slurm.sh", SMOKE, "--out", out, **slurm, programs=srun.parent, cwd=ROOT)
    assert output.count("finished before") == 6
    (launched,) = (tmp_path / "log").read_text().splitlines()
    assert launched.startswith("srun --kill-on-bad-exit=1 python -m sdzero collect ")
    config = yaml.safe_load((out / "collect/stage.yaml").read_text())
    assert (config["devices"], config["num_nodes"]) == (2, 1)
    for name in ("traces.jsonl", "questions.json", "statistics.json"):
        assert (out / "collect" / name).read_bytes() == (smoke_run / "collect" / name).read_bytes()
    counts = [len((out / f"collect/journal/{log}").read_text().splitlines()) for log in ("calls.log", "calls-1.log")]
    assert counts == [4, 4]
    assert records(out)["collect"]["config"]["devices"] == 2


def test_torchrun_trains_on_two_ranks(smoke_run: Path, tmp_path: Path) -> None:
    """A recipe of one stage, cut short."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "recipe").mkdir()
    source = {"class_path": "sdzero.data.TraceFile", "init_args": {"path": str(smoke_run / "collect/traces.jsonl")}}
    evaluation = {"num_questions": 2, "num_samples": 1, "num_revised": 0}
    whole = {stage.name: stage.settings for stage in list_stages(load_recipe(SMOKE), tmp_path)}
    train, test = whole["srt"], whole["base/eval"]
    train["model"]["init_args"]["student"]["path"] = str(smoke_run / "base/model")
    train["data"]["init_args"] |= {"source": source, "task": None, "engine": None, "evaluation": {"num_questions": 0}}
    train["trainer"]["max_steps"] = 2
    test["data"]["init_args"]["evaluation"] |= evaluation
    test["trainer"]["callbacks"] = None
    for name, config in {"recipe": {"stages": {"srt": None}}, "srt": train, "eval": test}.items():
        (tmp_path / f"recipe/{name}.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "runs/recipe"
    bash("torchrun.sh", tmp_path / "recipe", DEVICES="2", MASTER_PORT=port, cwd=tmp_path)
    assert [step for step, _ in scalars(out / "srt", "train/loss")[0]] == [0, 1]
    assert (out / "srt/model/model.safetensors").is_file() and len(read_json(out / "eval/rewards.json")) == 2


def page_commands() -> list[str]:
    page = (ROOT / "docs/scaling.md").read_text()
    return [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.S) for line in block.splitlines()]


def test_the_pages_commands_parse() -> None:
    """Each names files that exist, options that exist, and a recipe that is one."""
    kinds = set[str]()
    for line in page_commands():
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        if words[0] in ("bash", "sbatch"):
            script, recipe = words[1:]
            assert (ROOT / script).parent == CLUSTER and (ROOT / recipe / "recipe.yaml").is_file(), line
            kinds.add(words[0])
            continue
        assert words[0] in ("sdzero", "torchrun"), line
        command, *arguments = words[words.index("sdzero") + 1 :]
        if command == "run":
            options = pipeline._parser().parse_args(arguments)
            recipe = load_recipe(ROOT / options.recipe, [ROOT / overlay for overlay in options.overlay])
            for stage in list_stages(recipe, Path("out"), Options(devices=options.devices)):
                config = stage.settings if stage.command == "collect" else stage.settings["trainer"]
                assert options.devices in (None, config["devices"]), line
        else:
            check_stage(command, arguments)
        kinds.add(command)
    assert kinds >= {"bash", "sbatch", "run", "collect", "fit", "test"}
