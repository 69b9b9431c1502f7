"""A user's mistake gives one line that names the key and the remedy, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from sdzero.engines import TransformersEngine
from support.runs import SMOKE, command, exit_code, read_json, refusal, rows, sdzero

Arguments = Callable[..., list[str]]


@pytest.fixture
def arguments(smoke_run: Path, tmp_path: Path) -> Arguments:
    """Build a command's arguments on the smoke run's files, with overrides."""
    model = {"fit": "model.init_args.student.path", "test": "model.init_args.student.path", "collect": "student.path"}
    stages = {
        "srt": ("fit", "base", {"data.init_args.source.init_args.path": smoke_run / "collect/traces.jsonl"}),
        "self_distill": ("fit", "srt", {"data.init_args.disjoint_from": smoke_run / "collect/questions.json"}),
        "eval": ("test", "srt", {}),
        "collect": ("collect", "base", {}),
    }

    def make(stage: str, **overrides: Any) -> list[str]:
        name, of, inputs = stages[stage]
        values = {model[name]: smoke_run / of / "model", **inputs}
        values["out" if name == "collect" else "trainer.default_root_dir"] = tmp_path / "out"
        values |= {key.replace("__", "."): value for key, value in overrides.items()}
        return [name, "--config", str(SMOKE / f"{stage}.yaml"), *(f"--{k}={v}" for k, v in values.items())]

    return make


@pytest.fixture
def refuse(
    arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Return a stage's error message; fail the test if weights are loaded."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("weights were loaded before the mistake was found")

    for name in ("from_pretrained", "from_config"):
        monkeypatch.setattr(transformers.AutoModelForCausalLM, name, reached)
    monkeypatch.setattr(TransformersEngine, "start", reached)
    return lambda stage, **overrides: refusal(capsys, monkeypatch, *arguments(stage, **overrides))


def copy_model(source: Path, target: Path, **config: Any) -> Path:
    """Copy a model folder with changed values in config.json."""
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps({**read_json(target / "config.json"), **config}))
    return target


# --- keys and folders -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "override", "named"),
    [
        ("srt", {"data__trace_per_step": 4}, "'trace_per_step' is not accepted"),
        ("self_distill", {"model__divergence__kinds": "forward"}, "divergence.kinds"),
        ("self_distill", {"trainer__max_stps": 4}, "--trainer.max_stps"),
        ("self_distill", {"trainer__max_step": 4}, "--trainer.max_step"),  # abbreviations are not keys
        ("collect", {"call_siz": 4}, "--call_siz"),
        ("self_distill", {"data__engine__max_batchsize": 4}, "max_batchsize"),
        ("eval", {"data__evaluation__num_questions": "many"}, "evaluation.num_questions"),
        ("collect", {"branch": "both"}, "--branch"),
        ("collect", {"branches": "wrong"}, "branches"),
    ],
)
def test_a_misspelt_key_or_a_value_of_the_wrong_type(
    refuse: Callable[..., str], stage: str, override: dict[str, Any], named: str
) -> None:
    message = refuse(stage, **override)
    assert named in message and "--help` lists the keys" in message and "NoneType" not in message


@pytest.mark.parametrize("stage", ["srt", "self_distill", "eval", "collect"])
def test_a_missing_model_folder(refuse: Callable[..., str], tmp_path: Path, stage: str) -> None:
    key = "student__path" if stage == "collect" else "model__init_args__student__path"
    message = refuse(stage, **{key: tmp_path / "nowhere"})
    assert f"student.path: no model folder at '{tmp_path}/nowhere'" in message and "run that stage first" in message


def test_a_missing_config_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("fit", "test", "collect"):
        message = refusal(capsys, monkeypatch, name, "--config", tmp_path / "no.yaml")
        assert f"File does not exist: '{tmp_path}/no.yaml'" in message


def test_no_chat_template(refuse: Callable[..., str], smoke_run: Path, tmp_path: Path) -> None:
    model = copy_model(smoke_run / "base/model", tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    for stage, key in (("srt", "model__init_args__student__path"), ("collect", "student__path")):
        message = refuse(stage, **{key: model})
        assert "has no chat template" in message and "put a chat_template.jinja beside its tokenizer" in message


def test_a_missing_vllm(refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for stage, key in (("self_distill", "data__engine"), ("eval", "data__engine"), ("collect", "engine")):
        message = refuse(stage, **{key: "sdzero.engines.VLLMEngine"})
        assert 'pip install "sdzero[cpu]"' in message and "use TransformersEngine" in message


# --- D_revision -----------------------------------------------------------------------------------


def test_missing_empty_or_damaged_traces(refuse: Callable[..., str], smoke_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    message = refuse("srt", data__source__path=path)
    assert f"data.source.path: no traces at {path}; `sdzero collect` writes them" in message
    path.write_text("")
    assert f"data.source.path: {path} holds no trace" in refuse("srt", data__source__path=path)
    whole = (smoke_run / "collect/traces.jsonl").read_text()
    path.write_text(whole[:-20] + "\n")
    last = len(whole.splitlines())
    assert f"{path}: line {last} is damaged" in refuse("srt", data__source__path=path)


def test_traces_longer_than_the_model(refuse: Callable[..., str], smoke_run: Path, tmp_path: Path) -> None:
    traces = rows(smoke_run / "collect/traces.jsonl")
    longest = max(sum(len(t[k]) for k in t if k.endswith("_ids")) for t in traces)
    model = copy_model(smoke_run / "base/model", tmp_path / "model", max_position_embeddings=longest - 1)
    message = refuse("srt", model__init_args__student__path=model)
    assert f"the longest trace has {longest} tokens, but the model has {longest - 1} positions" in message


# --- questions and lengths ------------------------------------------------------------------------


def test_missing_questions_of_phase_1(refuse: Callable[..., str], tmp_path: Path) -> None:
    message = refuse("self_distill", data__disjoint_from=tmp_path / "no.json")
    assert f"disjoint_from: no file {tmp_path}/no.json; `sdzero collect` writes it" in message


@pytest.mark.parametrize("room", [0, 1])
def test_lengths_that_do_not_fit(
    arguments: Arguments, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Phase 2: prompt + 2y + P_r, with at most 2 operations per question and 15 tokens in P_0."""
    most = (1024 - (1 + 2 * 2 + 2) - 15) // 2 + 1
    if room:
        with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
            refuse("self_distill", data__sampling__max_new_tokens=most - 1)
        return
    message = refuse("self_distill", data__sampling__max_new_tokens=most)
    assert f"sampling.max_new_tokens ({most})" in message and "the model has 1024 positions" in message
    assert "Lower sampling.max_new_tokens" in message


def test_engine_prompts_too_long(refuse: Callable[..., str], smoke_run: Path, tmp_path: Path) -> None:
    """Prompts without room for an answer, and answers without room for a revision."""
    model = copy_model(smoke_run / "base/model", tmp_path / "model", max_position_embeddings=60)
    message = refuse("eval", model__init_args__student__path=model)
    assert "evaluation: the longest prompt (7) + sampling.max_new_tokens (64)" in message
    message = refuse("collect", student__path=model)
    assert "sampling.max_new_tokens=64: the longest prompt (7)" in message and "the model has 60 positions" in message


# --- values ---------------------------------------------------------------------------------------

CHAINS = json.dumps({"class_path": "sdzero.tasks.Chains", "init_args": {"min_ops": 1, "max_ops": 2}})
IN_PHASE_1, IN_PHASE_2 = (
    json.dumps({"split": split, "num_questions": num, "sampling": {"max_new_tokens": 64}})
    for split, num in (("phase1", 64), ("phase2", 5))
)
OF_TRACES = {"data__task": CHAINS, "data__engine": "sdzero.engines.TransformersEngine", "data__evaluation": IN_PHASE_1}
PHRASE = "model__student__control_phrases__"
PHRASES = "was collected with other control phrases … student.control_phrases"
OVERLAP = "48 questions of phase 2 are also in phase 1 (disjoint_from), e.g. ['chains/ … choose another split"
FEWER = "num_questions=100000, but split 'phase … request fewer"
TOP_K = "divergence.top_k=38: must be from 1 to 37, the size of the vocabulary"
WARMUP = "schedule: set warmup_steps or warmup_ratio, not both"
EMPTY = "evaluation needs data.task, data.engine and data.evaluation.num_questions above 0"


@pytest.mark.parametrize(
    ("stage", "overrides", "parts"),
    [
        ("srt", {f"{PHRASE}correct": "Wait, let me start over."}, PHRASES),
        ("srt", {f"{PHRASE}incorrect": "Wait, let me start over."}, PHRASES),
        ("srt", OF_TRACES, "questions of the traces are also in the evaluation, e.g. ['chains/"),
        ("eval", {"data__evaluation__num_questions": 0}, EMPTY),
        ("collect", {"sampling__max_new_tokens": 600}, "sampling.max_new_tokens=600 … the model has 1024 positions"),
        ("collect", {"num_questions": 100_000}, FEWER),
        ("self_distill", {"data__num_questions": 100_000}, FEWER),
        ("self_distill", {"data__split": "phase1"}, OVERLAP),
        ("self_distill", {"data__evaluation": IN_PHASE_2}, "5 questions of phase 2 are also in evaluation"),
        (
            "self_distill",
            {"model__divergence__top_k": 38},
            "divergence.top_k=38: must be from 1 to 37, the size of the",
        ),
        ("self_distill", {"model__student__dtype": "bfloat16"}, "student.dtype: trained weights must be float32"),
        ("self_distill", {"trainer__precision": "bf16-true"}, "trainer.precision=bf16-true"),
        (
            "self_distill",
            {"model__schedule__warmup_ratio": 0.5},
            "schedule: set warmup_steps or warmup_ratio, not both",
        ),
        ("self_distill", {"data__prompts_per_step": 0}, "data.prompts_per_step must be at least 1"),
        ("self_distill", {"data__call_size": 0}, "data.call_size must be at least 1"),
        ("self_distill", {"data__sampling__temperature": -1}, "temperature must be at least 0"),
    ],
    ids=str,
)
def test_values_that_cannot_work(refuse: Callable[..., str], stage: str, overrides: dict[str, Any], parts: str) -> None:
    message = refuse(stage, **overrides)
    assert [part for part in parts.split(" … ") if part not in message] == []


# --- in a separate process -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "override", "named"),
    [
        ("self_distill", {"data__split": "phase1"}, "also in phase 1 (disjoint_from)"),
        ("collect", {"call_sizes": 3}, "--call_sizes"),
    ],
)
def test_only_one_line_is_printed(arguments: Arguments, stage: str, override: dict[str, Any], named: str) -> None:
    done = sdzero(*arguments(stage, **override))
    assert done.returncode in (1, 2) and named in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(lines) == 1 and lines[0].startswith(f"sdzero {command(*arguments(stage))[3]}: error: ")


def test_an_error_of_a_library_keeps_its_traceback(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        json.loads("{")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(ValueError, match="Expecting property name"):
        exit_code(monkeypatch, *arguments("collect"))
