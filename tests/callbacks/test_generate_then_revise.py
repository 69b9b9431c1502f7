"""Revisions of first attempts, counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest

from sdzero.callbacks import GenerateThenRevise
from sdzero.data import Evaluation, EvaluationDataModule, RolloutDataModule
from sdzero.methods import Policy, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Sampling
from support.helpers import Notes, Toy, encode, make_trainer
from support.tiny_model import write_tiny_model

P0 = "Wait, this response is not correct, let me start over."
P1 = "Let me rephrase the above solution."
NUM_QUESTIONS, NUM_SAMPLES, NUM_ATTEMPTS = 3, 3, 2
FIRST = ["1", "?", "1"], ["?", "??", "2"], ["3", "so 3", "3"]  # the gold answers are 1, 2 and 3
REVISED = ["so 1", "1"], ["?", "2"], ["oops", "3"]
METRICS = (
    *("acc1", "acc2", "wrong_to_right", "right_to_wrong"),
    *("correction_rate", "wrong_to_right_rate", "right_to_wrong_rate"),
)
# rewards of the pairs: (1, 1) (0, 1) | (0, 0) (0, 1) | (1, 0) (1, 1)
REVISE = dict(zip(METRICS, (3 / 6, 4 / 6, 2, 1, (4 / 6 - 3 / 6) / (1 - 3 / 6), 2 / 3, 1 / 3), strict=True))
# rewards 1 0 1 | 0 0 1 | 1 1 1, each with the next one: (1, 0) (0, 1) (1, 1) | (0, 0) (0, 1) (1, 0) | three of (1, 1)
RESAMPLE = dict(zip(METRICS, (6 / 9, 6 / 9, 2, 2, 0, 2 / 3, 2 / 6), strict=True))


class Script(Notes):
    """Responds with the next line of a question's part; revisions have a part of their own."""

    def __init__(self, builder: PromptBuilder) -> None:
        super().__init__(self.respond)
        self.plain = builder.prompt
        self.lines: dict[tuple[str, bool], Iterator[str]] = {}

    def respond(self, prompt: Prompt, seed: int) -> str:
        revises = prompt.token_ids != self.plain(prompt.question).token_ids
        if not prompt.question.id.startswith("eval"):
            return "?"
        part, number = (REVISED if revises else FIRST), int(prompt.question.id.removeprefix("eval-"))
        key = prompt.question.id, revises
        line = next(self.lines.get(key, iter(())), None)
        if line is None:  # another evaluation begins
            self.lines[key] = iter(part[number])
            line = next(self.lines[key])
        return line


def metrics(trainer: L.Trainer, kind: str) -> dict[str, float]:
    return {name: float(trainer.callback_metrics[f"eval/{kind}_{name}"]) for name in METRICS}


def evaluation(call_size: int) -> Evaluation:
    sampling = Sampling(temperature=0.7, max_new_tokens=6)
    whole = Evaluation(num_questions=NUM_QUESTIONS, num_samples=NUM_SAMPLES, num_revised=NUM_ATTEMPTS)
    return replace(whole, sampling=sampling, call_size=call_size)


@pytest.mark.parametrize(
    ("stage", "call_size"), [("validate", 512), *(("test", size) for size in (NUM_SAMPLES, 2 * NUM_SAMPLES, 512))]
)
def test_the_metrics_are_those_counted_by_hand(
    path: Path, builder: PromptBuilder, tmp_path: Path, stage: str, call_size: int
) -> None:
    """Whatever the size of a call; twice in a row, so nothing is left from the evaluation before."""
    engine = Script(builder)
    data = EvaluationDataModule(Toy(), engine, evaluation(call_size), max_logprob_gap=99)
    trainer = make_trainer(tmp_path, GenerateThenRevise())
    method = Policy(ModelConfig(str(path)))
    for _ in range(2):
        getattr(trainer, stage)(method, datamodule=data, verbose=False)
        assert metrics(trainer, "revise") == pytest.approx(REVISE)
        assert metrics(trainer, "resample") == pytest.approx(RESAMPLE)
        assert trainer.callback_metrics["eval/revise_dropped"] == 0
        assert trainer.callback_metrics["eval/avg_at_k"] == pytest.approx(6 / 9)
        for name, parts in (("tokens1", [texts[:NUM_ATTEMPTS] for texts in FIRST]), ("tokens2", REVISED)):
            lengths = [len(encode(builder, text)) + 1 for texts in parts for text in texts]
            assert trainer.callback_metrics[f"eval/revise_{name}"] == pytest.approx(sum(lengths) / len(lengths))


def test_revisions_are_asked_for_as_in_collection(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    """prompt + body(y) + bridge(r), written out."""
    engine = Script(builder)
    data = EvaluationDataModule(Toy(), engine, evaluation(512), max_logprob_gap=99)
    make_trainer(tmp_path, GenerateThenRevise()).test(Policy(ModelConfig(str(path))), data, verbose=False)
    (_, first), (_, revisions) = engine.calls
    assert len(first) == NUM_QUESTIONS * NUM_SAMPLES
    expected = []
    for i, (question, part) in enumerate(zip(Toy().questions("eval", NUM_QUESTIONS), FIRST, strict=True)):
        for text in part[:NUM_ATTEMPTS]:
            right = text.endswith(str(i + 1))
            phrase = P1 if right else P0
            expected.append(builder.prompt(question).token_ids + encode(builder, f"{text}\n\n{phrase}\n\n"))
    assert [prompt.token_ids for prompt in revisions] == expected


def test_it_revises_the_validations_of_a_training_run(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(metrics(trainer, "revise"))

    sampling = Sampling(max_new_tokens=4)
    data = RolloutDataModule(
        Toy(), Script(builder), 2, 1, sampling=sampling, evaluation=evaluation(512), max_logprob_gap=99
    )
    trainer = make_trainer(tmp_path, GenerateThenRevise(), Watch(), val_check_interval=1)
    trainer.fit(method := SelfDistill(ModelConfig(str(path))), datamodule=data)
    assert seen == [pytest.approx(REVISE)] * 2
    assert method.num_generations == 2  # an evaluation's are not in the budget


def test_what_would_not_fit_is_dropped_and_counted(builder: PromptBuilder, tmp_path: Path) -> None:
    """The positions hold a prompt and a long answer, and a revision only after a short one."""
    prompt = max(len(builder.prompt(q).token_ids) for q in Toy().questions("eval", NUM_QUESTIONS))
    bridges = [len(builder.bridge(r)) for r in (0, 1)]
    limit = prompt + 1 + max(bridges) + 6  # "so 1" has 4 tokens, "1" has one
    path = write_tiny_model(tmp_path / "model", max_position_embeddings=limit)
    data = EvaluationDataModule(Toy(), Script(builder), evaluation(512), max_logprob_gap=99)
    trainer = make_trainer(tmp_path, GenerateThenRevise())
    lengths = [(len(encode(builder, t)), bridges[t.endswith(str(i + 1))]) for i, p in enumerate(FIRST) for t in p[:2]]
    dropped = sum(prompt + length + bridge + 6 > limit for length, bridge in lengths)
    assert 0 < dropped < len(lengths)
    for _ in range(2):
        trainer.test(Policy(ModelConfig(str(path))), data, verbose=False)
        assert trainer.callback_metrics["eval/revise_dropped"] == dropped
        assert trainer.callback_metrics["eval/revise_acc1"] != pytest.approx(REVISE["acc1"])
        assert metrics(trainer, "resample") == pytest.approx(RESAMPLE)


def test_an_evaluation_without_revisions_is_refused(path: Path, builder: PromptBuilder, tmp_path: Path) -> None:
    data = EvaluationDataModule(Toy(), Script(builder), replace(evaluation(512), num_revised=0), max_logprob_gap=99)
    with pytest.raises(ValueError, match=r"data\.evaluation\.num_revised"):
        make_trainer(tmp_path, GenerateThenRevise()).test(Policy(ModelConfig(str(path))), data, verbose=False)
    with pytest.raises(ValueError, match=r"num_revised must lie in 0\.\.num_samples \(2\), got 3"):
        Evaluation(num_questions=1, num_samples=2, num_revised=3)
