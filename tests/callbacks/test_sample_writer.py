"""Samples on disk and in TensorBoard are what was sampled."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdzero.callbacks import SampleWriter
from sdzero.data import Evaluation, EvaluationDataModule
from sdzero.methods import Policy, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.report import RunFolder
from sdzero.types import Prompt, Question, Sampling
from sdzero.utils.files import PARTIAL
from support.helpers import Notes, Toy, fit, make_batch, make_scored, make_trainer
from support.runs import rows


def text_of(folder: Path, tag: str) -> list[tuple[int, str]]:
    (file,) = folder.glob("events*")
    events = EventAccumulator(str(file)).Reload().Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def test_training_steps(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    texts = [("so 2", 1, False), ("# <b>no</b>\n\n1", 0, False), ("never", 0, True)]
    scored = [make_scored(builder, Question(f"q{i}", f"{i}+1=", "2"), t, r, c) for i, (t, r, c) in enumerate(texts)]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    batches = [make_batch(scored, version) for version in range(4)]
    fit(SelfDistill(ModelConfig(str(path))), batches, tmp_path, SampleWriter(3, num_samples=2), logger=logger)
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["train-000000-rank0.jsonl", "train-000003-rank0.jsonl"]
    same = {"step": 3, "sample": 0, "answer": "2", "parsed": None, "finish_reason": "stop", "revision": None}
    expected: list[dict[str, Any]] = []
    for i, (text, reward, _) in enumerate(texts[:2]):
        verdict = {"reward": reward, "reason": "correct" if reward else "wrong"}
        about = {"question": f"q{i}", "text": f"{i}+1=", "num_tokens": len(scored[i].rollout.token_ids)}
        expected.append({**same, **about, "response": text, **verdict})
    assert rows(files[1]) == expected
    (first, shown), (second, _) = text_of(tmp_path, "samples/train")
    assert (first, second) == (0, 3)
    for part in ("    0+1=\n    (answer: 2)", "    # <b>no</b>\n    \n    1"):  # indented: shown as it is, not rendered
        assert part in shown
    assert "never" not in shown


@pytest.mark.parametrize("call_size", [2, 4, 512])
def test_evaluations(path: Path, builder: PromptBuilder, tmp_path: Path, call_size: int) -> None:
    """The first answers to the first questions with their revisions, whatever the size of a call."""

    def respond(prompt: Prompt, seed: int) -> str:
        revises = prompt.token_ids != builder.prompt(prompt.question).token_ids
        return f"so {prompt.question.answer}" if revises else "no"

    sampling = Sampling(max_new_tokens=9)
    settings = Evaluation(num_questions=5, num_samples=2, num_revised=1, sampling=sampling, call_size=call_size)
    data = EvaluationDataModule(Toy(), Notes(respond), settings, max_logprob_gap=99)
    trainer = make_trainer(tmp_path, SampleWriter(num_samples=3))
    for _ in range(2):  # nothing is left from the evaluation before
        trainer.test(Policy(ModelConfig(str(path))), datamodule=data, verbose=False)
        written = rows(tmp_path / "samples/eval-000000-rank0.jsonl")
        assert [row["question"] for row in written] == ["eval-0", "eval-1", "eval-2"]
        assert {row["response"] for row in written} == {"no"} and {row["reward"] for row in written} == {0}
        assert [row["revision"]["response"] for row in written] == ["so 1", "so 2", "so 3"]
        assert {row["revision"]["reward"] for row in written} == {1}


def test_all_answers_are_kept_as_they_come(path: Path, tmp_path: Path) -> None:
    """Every answer once, with its number among the question's; the file has its name only once it is whole."""
    folder, on_the_way, numbers = tmp_path / "samples", list[str](), count()

    def respond(prompt: Prompt, seed: int) -> str:
        if folder.exists():
            on_the_way.extend(file.name for file in folder.iterdir())
        return f"so {next(numbers)}"

    settings = Evaluation(num_questions=20, num_samples=3, sampling=Sampling(max_new_tokens=40), call_size=9)
    data = EvaluationDataModule(Toy(), Notes(respond), settings, max_logprob_gap=99)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = make_trainer(tmp_path, SampleWriter(num_samples=None), logger=logger)
    trainer.test(Policy(ModelConfig(str(path))), datamodule=data, verbose=False)
    written = rows(folder / "eval-000000-rank0.jsonl")
    expected = [(f"eval-{i}", k) for i in range(20) for k in range(3)]
    assert [(row["question"], row["sample"]) for row in written] == expected
    assert [row["response"] for row in written] == [f"so {i}" for i in range(60)]
    assert {*on_the_way} == {f"eval-000000-rank0.jsonl{PARTIAL}"}
    ((_, shown),) = text_of(tmp_path, "samples/eval")
    assert shown.count("(answer: ") == 16


def test_training_steps_keep_all_responses_to_a_question(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    scored = [make_scored(builder, Question(f"q{i % 2}", "1+1=", "2"), f"so {i}", 0) for i in range(20)]
    fit(SelfDistill(ModelConfig(str(path))), [make_batch(scored)], tmp_path, SampleWriter(num_samples=None))
    written = rows(tmp_path / "samples/train-000000-rank0.jsonl")
    assert [(r["question"], r["sample"], r["response"]) for r in written] == [
        (f"q{i % 2}", i // 2, f"so {i}") for i in range(20)
    ]


def test_the_report_reads_first_answers(tmp_path: Path) -> None:
    (tmp_path / "base/eval/samples").mkdir(parents=True)
    kept = [{"question": f"q{i}", "sample": k} for i in range(2) for k in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    for kind in ("eval", "train"):
        (tmp_path / f"base/eval/samples/{kind}-000000-rank0.jsonl").write_text(lines)
    run = RunFolder(tmp_path)
    assert run.samples("base/eval") == [kept[0], kept[3]]
    assert run.samples("base/eval", "train") == kept


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="every_n_steps and num_samples"):
        SampleWriter(every_n_steps=0)
    with pytest.raises(ValueError, match="or null"):
        SampleWriter(num_samples=0)


def test_a_restart_on_fewer_ranks_leaves_nothing_of_the_others_at_its_steps(
    path: Path, builder: PromptBuilder, tmp_path: Path
) -> None:
    scored = [make_scored(builder, Question("q", "1+1=", "2"), "so 2", 1)]
    (tmp_path / "samples").mkdir()
    before = [f"{name}.jsonl" for name in ("train-000000-rank1", "train-000001-rank1", "eval-000001-rank1")]
    for name in before:
        (tmp_path / "samples" / name).write_text("{}\n")
    fit(SelfDistill(ModelConfig(str(path))), [make_batch(scored)], tmp_path, SampleWriter(1))
    files = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert files == sorted(["train-000000-rank0.jsonl", *before[1:]])
    assert rows(tmp_path / "samples/train-000000-rank0.jsonl")[0]["question"] == "q"
