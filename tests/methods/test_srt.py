"""SRT's one weighted pass against two plain transformers passes of each trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdzero.methods import SFT, SRT
from sdzero.models.language_model import ModelConfig
from sdzero.prompts import PromptBuilder
from sdzero.types import Trace, TraceBatch
from support.helpers import Steps, fit, make_trace, plain_logprobs, plain_model, same

TERMS = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 1.7)]


@pytest.fixture(scope="module")
def traces(path: Path) -> list[Trace]:
    """Both branches, unequal lengths, and a demonstration, which has no revision term."""
    builder = PromptBuilder.from_pretrained(path)
    return [
        make_trace(builder, "a", "1+1=3", "1+1=2", reward=0),
        make_trace(builder, "b", "2", "let me think: 1+1 is 2, so the answer is 2", reward=1),
        make_trace(builder, "c", "I am not sure at all", "2", reward=0),
        make_trace(builder, "d", None, "the answer is 2", reward=None),
    ]


def run(path: Path, traces: list[Trace], root: Path, num_steps: int = 1, **options) -> tuple[SRT, Steps]:
    options = {"max_grad_norm": 0, **options}
    method = SRT(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **options)
    return method, fit(method, [TraceBatch(traces, i) for i in range(num_steps)], root)


def two_passes(path: Path, traces: list[Trace], reduction: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """L_revision (equation 1) and L_generation (equation 2), each from forward passes of its own."""
    model = plain_model(path)

    def surprisal(context: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
        return -plain_logprobs(model, context, target).gather(1, torch.tensor(target)[:, None]).sum()

    with_init = [t for t in traces if t.reward is not None]
    revision = torch.stack([surprisal(t.prompt_ids + t.init_ids + t.bridge_ids, t.revised_ids) for t in with_init])
    rest = [t.init_ids + t.bridge_ids + t.revised_ids for t in traces]
    generation = torch.stack([surprisal(t.prompt_ids, r) for t, r in zip(traces, rest, strict=True)])
    if reduction == "sequence_sum":
        return revision.mean(), generation.mean(), dict(model.named_parameters())
    num_revised, num_generated = sum(len(t.revised_ids) for t in with_init), sum(map(len, rest))
    return revision.sum() / num_revised, generation.sum() / num_generated, dict(model.named_parameters())


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
@pytest.mark.parametrize("terms", TERMS)
def test_one_pass_is_two_passes(
    path: Path, traces: list[Trace], tmp_path: Path, terms: tuple[float, float], reduction: str
) -> None:
    """Equation 3: loss and every gradient, with the traces spread over micro batches."""
    a, b = terms
    options = {"revision_weight": a, "generation_weight": b, "reduction": reduction}
    _, steps = run(path, traces, tmp_path, max_tokens_per_micro_batch=160, **options)
    revision, generation, parameters = two_passes(path, traces, reduction)
    loss = a * revision + b * generation
    loss.backward()

    (metrics,), (gradients,) = steps.metrics, steps.gradients
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["train/loss_revision"] == pytest.approx(revision.item(), rel=1e-5)
    assert metrics["train/loss_generation"] == pytest.approx(generation.item(), rel=1e-5)
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), parameters[name].grad, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", [SFT, SRT])
def test_traces_without_a_first_attempt_are_sft(path: Path, tmp_path: Path, kind: type[SFT]) -> None:
    """The loss is transformers' own, whatever the weight of the revision term, and no token counts twice."""
    builder = PromptBuilder.from_pretrained(path)
    trace = make_trace(builder, "a", None, "the answer is 2", reward=None)
    options: dict[str, Any] = {"revision_weight": 3.0} if kind is SRT else {}
    method = kind(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **options)
    steps = fit(method, [TraceBatch([trace], 0)], tmp_path)
    ids = torch.tensor([trace.prompt_ids + trace.revised_ids])
    labels = ids.clone()
    labels[0, : len(trace.prompt_ids)] = -100
    expected = plain_model(path)(ids, labels=labels).loss.item()
    assert steps.metrics[0]["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert steps.metrics[0].get("train/loss_revision", 0) == 0
    assert method.num_tokens_trained == len(trace.revised_ids)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_sft_is_the_generation_term(path: Path, traces: list[Trace], tmp_path: Path, reduction: Any) -> None:
    """Bit for bit, on mixed traces in one micro batch; N_rev does not count."""
    sft = SFT(ModelConfig(str(path)), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), reduction=reduction)
    alone = fit(sft, [TraceBatch(traces, 0)], tmp_path)
    _, generation = run(path, traces, tmp_path, revision_weight=0.0, max_grad_norm=1.0, reduction=reduction)
    assert alone.metrics[0]["train/loss"] == generation.metrics[0]["train/loss"]
    assert same(alone.gradients[0], generation.gradients[0])
    assert sft.num_tokens_trained == sum(len(t.init_ids + t.bridge_ids + t.revised_ids) for t in traces)


def test_tokens_trained_are_those_of_both_terms(path: Path, traces: list[Trace], tmp_path: Path) -> None:
    """Appendix C.2: N_rev + N_gen per trace and epoch."""
    method, steps = run(path, traces, tmp_path, num_steps=2)
    generated = sum(len(t.init_ids + t.bridge_ids + t.revised_ids) for t in traces)
    revised = sum(len(t.revised_ids) for t in traces if t.reward is not None)
    assert steps.curve("budget/tokens_trained") == [generated + revised, 2 * (generated + revised)]
    assert method.num_tokens_trained == 2 * (generated + revised)
    assert method.num_generations == method.num_tokens_sampled == 0


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_micro_batches_change_nothing(path: Path, traces: list[Trace], tmp_path: Path, reduction: str) -> None:
    method, one_by_one = run(path, traces, tmp_path, max_tokens_per_micro_batch=1, reduction=reduction)
    sizes: list[int] = []
    method.student.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    method.max_tokens_per_micro_batch = 10**6
    all_at_once = fit(method, [TraceBatch(traces, 0)], tmp_path)  # the learning rate is 0: these are the same weights
    assert sizes == [len(traces)]
    assert all_at_once.metrics[0]["train/loss"] == pytest.approx(one_by_one.metrics[0]["train/loss"], rel=1e-6)
    for name, gradient in all_at_once.gradients[0].items():
        torch.testing.assert_close(one_by_one.gradients[0][name], gradient, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("terms", [(-1.0, 1.0), (1.0, -0.1), (0.0, 0.0)])
def test_wrong_terms_are_refused(path: Path, terms: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="revision_weight and generation_weight"):
        SRT(ModelConfig(str(path)), revision_weight=terms[0], generation_weight=terms[1])
