"""SelfDistill against full float64 logits of student and teacher, response by response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdzero.losses import Divergence
from sdzero.methods import Context, Demonstration, Feedback, FinalAnswer, Plain, Revision, SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Rollout, ScoredRollout, Verdict
from support.helpers import (
    Steps,
    fit,
    make_batch,
    make_scored,
    plain_logprobs,
    plain_model,
    read_by_hand,
    same,
    weights_of,
)
from support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same vocabulary, and of another shape."""
    return write_tiny_model(tmp_path_factory.mktemp("other"), seed=1, num_hidden_layers=1, hidden_size=32)


@pytest.fixture(scope="module")
def scored(builder: PromptBuilder) -> list[ScoredRollout]:
    """Both rewards, two responses to one question, and one without an end-of-turn token."""
    q0 = Question("q0", "1+1=", "2", {"solution": "one and one is 2"})
    q1 = Question("q1", "3+4=", "7", {"solution": "3, 4: 7"})
    return [
        make_scored(builder, q0, "the answer is 3", reward=0),
        make_scored(builder, q0, "the answer is 2", reward=1),
        make_scored(builder, q1, "Wait, wait, it is", reward=0, cut=True),
        make_scored(builder, q1, "7", reward=1),
    ]


def run(path: Path, scored: list[ScoredRollout], root: Path, **options: Any) -> tuple[SelfDistill, Steps]:
    method = SelfDistill(
        ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), max_grad_norm=0, **options
    )
    return method, fit(method, [make_batch(scored)], root)


def chat(build: Callable[[ScoredRollout], str]) -> Callable[[PromptBuilder, ScoredRollout], tuple[int, ...]]:
    return lambda builder, scored: builder.chat(build(scored))


def feedback(scored: ScoredRollout) -> str:
    """q0's and q1's wrong answers each have a sibling's success beside them; the right ones have none."""
    question = scored.rollout.prompt.question
    success = {"q0": "the answer is 2", "q1": "7"}[question.id]
    mend = "" if scored.verdict.reward else f"\nA correct attempt was:\n{success}"
    return f"{question.text}\n\nFeedback on an earlier attempt: {scored.verdict.reason}.{mend}"


READS: dict[str, tuple[Context, Callable[[PromptBuilder, ScoredRollout], tuple[int, ...]]]] = {
    "revision": (Revision(), read_by_hand),
    "plain": (Plain(), lambda builder, s: s.rollout.prompt.token_ids),
    "demonstration": (
        Demonstration("{question} Look: {demonstration}"),
        chat(lambda s: f"{(q := s.rollout.prompt.question).text} Look: {q.meta['solution']}"),
    ),
    "final answer": (
        FinalAnswer("{question} It is {answer}"),
        chat(lambda s: f"{(q := s.rollout.prompt.question).text} It is {q.answer}"),
    ),
    "feedback": (Feedback(), chat(feedback)),
}


class Reference:
    """Equation 4 with all logits of both models, one response at a time."""

    def __init__(
        self, student: Path, teacher: Path, builder: PromptBuilder, scored: list[ScoredRollout], read: Any
    ) -> None:
        self.model, reviser = plain_model(student), plain_model(teacher)
        self.rewards = [s.verdict.reward for s in scored]
        self.kl: list[Tensor] = []
        self.kl_reward: list[Tensor] = []
        for s in scored:
            ids = s.rollout.token_ids  # with its end-of-turn token: ending is learned too
            log_s = plain_logprobs(self.model, s.rollout.prompt.token_ids, ids)
            with torch.no_grad():
                log_t = plain_logprobs(reviser, read(builder, s), ids)
            self.kl.append((log_s.exp() * (log_s - log_t)).sum(-1))
            self.kl_reward.append((log_s - log_t).gather(1, torch.tensor(ids)[:, None]).squeeze(1).detach())

    def mean_of(self, values: list[Tensor], reward: int) -> float:
        return torch.cat([v for v, r in zip(values, self.rewards, strict=True) if r == reward]).mean().item()


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
@pytest.mark.parametrize("name", READS)
def test_the_loss_is_equation_4(
    path: Path,
    other: Path,
    builder: PromptBuilder,
    scored: list[ScoredRollout],
    tmp_path: Path,
    name: str,
    reduction: str,
) -> None:
    """Loss, gradients and logged metrics, with a teacher of another shape; in micro batches of one row and more."""
    context, read = READS[name]
    options = {"context": context, "teacher": ModelConfig(str(other)), "reduction": reduction}
    _, steps = run(path, scored, tmp_path, max_tokens_per_micro_batch=190, **options)
    reference = Reference(path, other, builder, scored, read)
    loss = (
        torch.cat(reference.kl).mean()
        if reduction == "token_mean"
        else torch.stack([k.sum() for k in reference.kl]).mean()
    )
    loss.backward()
    (metrics,), (gradients,) = steps.metrics, steps.gradients
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in gradients.items():
        expected = reference.model.get_parameter(parameter).grad
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    for reward in (0, 1):
        assert metrics[f"teacher/kl_r{reward}"] == pytest.approx(reference.mean_of(reference.kl, reward), rel=1e-5)
        expected = reference.mean_of(reference.kl_reward, reward)
        assert metrics[f"teacher/token_kl_reward_r{reward}"] == pytest.approx(expected, rel=1e-4)


def test_without_another_model_the_teacher_is_the_student_as_it_starts(
    path: Path, builder: PromptBuilder, scored: list[ScoredRollout], tmp_path: Path
) -> None:
    method, steps = run(path, scored, tmp_path)
    expected = torch.cat(Reference(path, path, builder, scored, read_by_hand).kl).mean().item()
    assert expected > 0.1  # the context alone makes the difference
    assert steps.metrics[0]["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert same(weights_of(method.teacher), weights_of(method.student))
    method, steps = run(path, scored, tmp_path, context=Plain())
    assert steps.metrics[0]["train/loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_positive_kl_reward_means_that_the_teacher_finds_the_token_less_likely(
    path: Path, other: Path, builder: PromptBuilder, tmp_path: Path, sign: int
) -> None:
    """Of all answers of one token, the one that the teacher finds least (most) likely beside the student."""
    prompt = builder.prompt(question := Question("q0", "1+1=", "2")).token_ids
    log_s, log_t = (plain_logprobs(plain_model(model), prompt, [0])[0] for model in (path, other))
    token = int((sign * (log_s - log_t)).argmax())
    response = Rollout(Prompt(question, prompt), (token,), (0.0,), "", "length", 0)
    options = {"teacher": ModelConfig(str(other)), "context": Plain()}
    _, steps = run(path, [ScoredRollout(response, Verdict(0, "truncated"))], tmp_path, **options)
    assert sign * steps.metrics[0]["teacher/token_kl_reward_r0"] > 0.5


def test_the_teacher_scores_the_second_copy(
    path: Path, builder: PromptBuilder, scored: list[ScoredRollout], tmp_path: Path
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, SelfDistill)
            pl_module.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))

    method = SelfDistill(ModelConfig(str(path)), max_tokens_per_micro_batch=1)
    fit(method, [make_batch(scored)], tmp_path, Watch())
    read = {read_by_hand(builder, s) + s.rollout.token_ids: len(s.rollout.token_ids) for s in scored}
    assert len(seen) == len(read) == len(scored)
    for input_ids, predicts in seen:
        num = read[tuple(input_ids[0].tolist())]
        last = len(input_ids[0]) - 1  # the logits at a place are those of the next token
        assert predicts[0].nonzero().flatten().tolist() == list(range(last - num, last))


def test_top_k_mass_is_the_teachers(
    path: Path, builder: PromptBuilder, scored: list[ScoredRollout], tmp_path: Path
) -> None:
    _, steps = run(path, scored, tmp_path, divergence=Divergence(top_k=4), max_tokens_per_micro_batch=1)
    model = plain_model(path)
    masses, kls = [], []
    for s in scored:
        log_t = plain_logprobs(model, read_by_hand(builder, s), s.rollout.token_ids).detach()
        log_s = plain_logprobs(model, s.rollout.prompt.token_ids, s.rollout.token_ids).detach()
        top = log_t.topk(4)
        masses.append(top.values.exp().sum(-1))
        inside_s, inside_t = log_s.gather(1, top.indices).log_softmax(-1), top.values.log_softmax(-1)
        kls.append((inside_s.exp() * (inside_s - inside_t)).sum(-1))
    assert steps.metrics[0]["teacher/top_k_mass"] == pytest.approx(torch.cat(masses).mean().item(), rel=1e-5)
    assert steps.metrics[0]["train/loss"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-5)


@pytest.mark.parametrize("mask", [False, True])
def test_cut_responses_can_be_left_out(path: Path, scored: list[ScoredRollout], tmp_path: Path, mask: bool) -> None:
    method, steps = run(path, scored, tmp_path, mask_truncated=mask)
    kept = [s for s in scored if s.rollout.finish_reason == "stop"] if mask else scored
    assert method.num_tokens_trained == 2 * sum(
        len(s.rollout.token_ids) for s in kept
    )  # the student's and the teacher's
    assert method.num_generations == len(scored)  # sampled all the same
    assert method.num_tokens_sampled == sum(len(s.rollout.token_ids) for s in scored)
    _, of_kept = run(path, kept, tmp_path)
    assert steps.metrics[0]["train/loss"] == pytest.approx(of_kept.metrics[0]["train/loss"], rel=1e-5)


def test_the_teacher_is_not_trained(path: Path, other: Path, scored: list[ScoredRollout], tmp_path: Path) -> None:
    method = SelfDistill(
        ModelConfig(str(path)), teacher=ModelConfig(str(other)), optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    batches = [make_batch(scored, version) for version in range(2)]
    fit(method, batches, tmp_path)
    start = {f"hf.{name}": p.detach().float() for name, p in plain_model(other).named_parameters()}
    assert same(weights_of(method.teacher), start)
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    moved = {f"hf.{name}": p.detach().float() for name, p in plain_model(path).named_parameters()}
    assert not any(torch.equal(p, moved[name]) for name, p in weights_of(method.student).items())


def test_a_bfloat16_teacher_is_allowed(path: Path, scored: list[ScoredRollout], tmp_path: Path) -> None:
    method, steps = run(path, scored, tmp_path, teacher=ModelConfig(str(path), dtype="bfloat16"))
    assert {p.dtype for p in method.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in method.student.parameters()} == {torch.float32}
    _, exact = run(path, scored, tmp_path)
    assert steps.metrics[0]["train/loss"] == pytest.approx(exact.metrics[0]["train/loss"], rel=0.05)


def test_incompatible_teachers_are_refused_before_weights_are_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    narrow = write_tiny_model(tmp_path / "narrow", vocab_size=100)
    vocab_size = ModelConfig(str(path)).hf_config().vocab_size
    monkeypatch.setattr("sdzero.methods.policy.load", never)
    monkeypatch.setattr("sdzero.methods.base.load", never)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    with pytest.raises(ValueError, match=rf"teacher\.path: its vocabulary has 100 tokens, the student's {vocab_size}"):
        SelfDistill(ModelConfig(str(path)), teacher=ModelConfig(str(narrow)))
    with pytest.raises(ValueError, match=rf"divergence\.top_k={vocab_size + 1}: must be from 1 to {vocab_size}"):
        SelfDistill(ModelConfig(str(path)), divergence=Divergence(top_k=vocab_size + 1))
    SelfDistill(ModelConfig(str(path)), divergence=Divergence(top_k=vocab_size))


def test_without_the_students_full_vocabulary_the_engines_logprobs_are_used(
    path: Path, scored: list[ScoredRollout], tmp_path: Path
) -> None:
    """Its log-probabilities are of the same weights; the student is not projected onto the whole vocabulary."""
    sampled = [replace(s, rollout=replace(s.rollout, logprobs=(-1.5,) * len(s.rollout.token_ids))) for s in scored]
    whole, top = (
        run(path, sampled, tmp_path, divergence=divergence)[1].metrics[0]
        for divergence in (Divergence(), Divergence(top_k=5))
    )
    model = plain_model(path)
    for reward in (0, 1):
        ours = [
            plain_logprobs(model, s.rollout.prompt.token_ids, s.rollout.token_ids)[range(len(ids)), list(ids)]
            for s in scored
            if s.verdict.reward == reward
            for ids in (s.rollout.token_ids,)
        ]
        shift = -1.5 - float(torch.cat(ours).detach().mean())
        name = f"teacher/token_kl_reward_r{reward}"
        assert top[name] == pytest.approx(whole[name] + shift, rel=1e-4)
