"""Loss heads against the reference on whole logits in float64, and their guarantees on memory, dtypes and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from sdzero.losses import Divergence, Kind, Outside, Support, matmul
from sdzero.losses.soft_targets import HiddenTargets
from support.loss_cases import DIVERGENCES, FORMS, HEADS, KINDS, OUTSIDES, SUPPORTS, Case, Recorder, name_of


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "BLOCK_ELEMENTS", 24)  # two rows of eleven


MIXED_ENDS = [Divergence("mixed", share, **form) for share in (0.0, 1.0) for form in FORMS]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("with_targets", [False, True])
@pytest.mark.parametrize("divergence", [*HEADS, *MIXED_ENDS], ids=name_of)
def test_heads_equal_the_reference_in_value_and_gradient(divergence: Divergence | None, with_targets: bool) -> None:
    case = Case()
    out = case.head(divergence, chunk_size=3, targets=case.targets if with_targets else None)
    values, loss, grads = case.exact(divergence)
    torch.testing.assert_close(out.metrics["divergence"] if divergence else -out.metrics["logprobs"], values)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(case.grads(out.loss), grads)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("with_targets", [False, True])
def test_metrics_are_full_vocabulary_log_probs_and_the_teachers_mass(form: dict[str, Any], with_targets: bool) -> None:
    """The student's log-probabilities need its whole vocabulary, which a renormalised top-k of the teacher does not."""
    case = Case()
    metrics = case.head(Divergence(**form), targets=case.targets if with_targets else None, chunk_size=5).metrics
    log_s, log_t = (logits.log_softmax(-1).detach() for logits in case.logits)
    row = torch.arange(len(case.targets))
    expected = {"teacher_logprobs": log_t[row, case.targets]} if with_targets else {}
    if with_targets and (form.get("support"), form.get("outside")) != ("teacher", "renormalize"):
        expected["student_logprobs"] = log_s[row, case.targets]
    if form:
        chooser = log_t if form["support"] == "teacher" else log_s
        expected["top_k_mass"] = log_t.gather(1, chooser.topk(4).indices).exp().sum(-1)
    assert not any(value.requires_grad for value in metrics.values())
    metrics.pop("divergence")
    torch.testing.assert_close(metrics, expected)


@settings(max_examples=100, deadline=None)
@given(
    divergence=st.sampled_from(HEADS),
    n=st.integers(0, 6),
    vocab=st.integers(5, 9),
    hidden=st.integers(1, 4),
    scale=st.sampled_from([1e-3, 1.0, 1e2, 1e4]),
    chunk_size=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_any_shape_chunk_and_extreme_logits_agree_with_the_reference(
    divergence: Divergence | None, n: int, vocab: int, hidden: int, scale: float, chunk_size: int, seed: int
) -> None:
    case = Case(n, vocab, hidden, scale, seed)
    out = case.head(divergence, chunk_size=chunk_size)
    values, _, exact = case.exact(divergence)
    ours = out.metrics["divergence"] if divergence else -out.metrics["logprobs"]
    torch.testing.assert_close(ours, values, rtol=1e-6, atol=1e-9)
    assert (ours >= -1e-9).all()
    grads = case.grads(out.loss)
    torch.testing.assert_close(grads, exact, rtol=1e-6, atol=1e-9 * max(1.0, scale))
    assert (grads[0][case.token_weights == 0] == 0).all()


@settings(max_examples=60, deadline=None)
@given(divergence=st.sampled_from(DIVERGENCES), scale=st.sampled_from([1.0, 1e2, 1e4]), seed=st.integers(0, 99))
def test_extreme_float32_logits_never_make_nan(divergence: Divergence, scale: float, seed: int) -> None:
    case = Case(5, 9, 3, scale, seed, torch.float32)
    out = case.head(divergence, targets=case.targets, chunk_size=2)
    assert all(torch.isfinite(value).all() for value in (out.loss, *out.metrics.values(), *case.grads(out.loss)))
    if divergence.support == "teacher" and divergence.top_k is not None:
        stored = case.head(divergence, case.stored(4))
        assert all(torch.isfinite(value).all() for value in (stored.loss, *case.grads(stored.loss)))


@pytest.mark.parametrize("divergence", HEADS, ids=name_of)
def test_no_tokens_give_a_zero_that_is_still_attached(divergence: Divergence | None) -> None:
    case = Case(0)
    for num_tokens in (5.0, 0.0):
        loss = case.head(divergence, num_tokens=num_tokens, targets=case.targets).loss
        assert loss.item() == 0.0
        hidden, weight = case.grads(loss)
        assert hidden.shape == (0, 5)
        assert torch.equal(weight, torch.zeros_like(weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_student_equal_to_its_teacher_is_at_zero_and_stays_there(kind: Kind, form: dict[str, Any]) -> None:
    case = Case(dtype=torch.float32)
    out = case.head(Divergence(kind, **form), HiddenTargets(case.hidden, case.weight))
    torch.testing.assert_close(out.metrics["divergence"], torch.zeros(7), atol=1e-6, rtol=0)
    for grad in case.grads(out.loss):
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", OUTSIDES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_support_of_the_whole_vocabulary_is_no_support(kind: Kind, support: Support, outside: Outside) -> None:
    case = Case()
    whole, full = case.head(Divergence(kind, top_k=11, support=support, outside=outside)), case.head(Divergence(kind))
    grads = case.grads(full.loss)
    torch.testing.assert_close(whole.loss, full.loss)
    torch.testing.assert_close(case.grads(whole.loss), grads)
    if support == "teacher":
        stored = case.head(Divergence(kind, top_k=11, outside=outside), case.stored(11))
        torch.testing.assert_close(stored.loss, full.loss)
        torch.testing.assert_close(case.grads(stored.loss), grads)


def test_no_gradient_reaches_the_teacher() -> None:
    case = Case()
    teacher = HiddenTargets(case.teacher.hidden.requires_grad_(), case.teacher.weight.requires_grad_())
    case.head(Divergence(), teacher).loss.backward()
    assert case.hidden.grad is not None
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None


each_head = pytest.mark.parametrize(
    "divergence", [None, Divergence(), Divergence(top_k=4), Divergence(top_k=4, outside="tail")], ids=name_of
)


@each_head
def test_tied_weights_get_both_gradients_and_micro_batches_add_up(divergence: Divergence | None) -> None:
    case = Case()

    def loss(hidden: Tensor) -> Tensor:
        return case.head(divergence, inputs=(hidden, case.weight), chunk_size=3).loss

    loss(case.weight[case.targets]).backward()
    loss(case.hidden).mul(3.0).backward()
    tied = case.weight[case.targets].detach().requires_grad_()
    (to_hidden, to_head), (_, second) = (torch.autograd.grad(loss(h), [h, case.weight]) for h in (tied, case.hidden))
    expected = (to_head + 3.0 * second).index_add(0, case.targets, to_hidden)
    assert case.weight.grad is not None
    torch.testing.assert_close(case.weight.grad, expected)


@each_head
def test_autocast_and_bfloat16_inputs_still_compute_in_float32(divergence: Divergence | None) -> None:
    case = Case(dtype=torch.bfloat16)
    _, expected, exact = case.exact(divergence)
    with torch.autocast("cpu", torch.bfloat16):
        for weight in (case.weight, case.weight.float()):
            loss = case.head(divergence, inputs=(case.hidden, weight), chunk_size=3).loss
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    grads = case.grads(case.head(divergence, chunk_size=3).loss)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close([grad.double() for grad in grads], exact, rtol=1e-2, atol=1e-4)


@each_head
def test_a_second_backward_is_refused_rather_than_wrong(divergence: Divergence | None) -> None:
    loss = Case().head(divergence, chunk_size=3).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


@pytest.mark.parametrize("divergence", HEADS, ids=name_of)
def test_logits_are_never_held_whole(divergence: Divergence | None) -> None:
    case = Case(n=96, vocab=200, hidden=8)
    with Recorder() as recorder:
        case.head(divergence, chunk_size=16, targets=case.targets).loss.backward()
    assert recorder.largest <= 16 * 200 * 2  # a chunk's logits, with room for the support's rows of the head
    assert recorder.calls


@pytest.mark.parametrize(
    ("grad", "hidden", "weight", "products"),
    [
        (True, True, True, 4),
        (True, True, False, 3),
        (True, False, True, 3),
        (True, False, False, 2),
        (False, True, True, 2),
    ],
)
def test_only_the_wanted_gradients_cost_products(grad: bool, hidden: bool, weight: bool, products: int) -> None:
    case = Case(n=4)
    case.hidden.requires_grad_(hidden)
    case.weight.requires_grad_(weight)
    with torch.set_grad_enabled(grad), Recorder() as recorder:
        loss = case.head(Divergence()).loss
    assert recorder.products == products
    assert loss.requires_grad == (grad and (hidden or weight))
    if loss.requires_grad:
        loss.backward()
        assert [case.hidden.grad is not None, case.weight.grad is not None] == [hidden, weight]


def test_a_renormalised_support_never_projects_the_student() -> None:
    case = Case(n=16, vocab=200, hidden=4)
    for teacher, products, rows in ((case.stored(4), 0, 4), (case.teacher, 1, 16)):
        with Recorder() as recorder:
            case.head(Divergence(top_k=4), teacher, targets=case.targets).loss.backward()
        assert recorder.calls.get("mm", 0) == products  # the teacher's logits alone
        assert recorder.largest <= 200 * rows  # the head's gradient, or those logits


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "backward"}, "kind"),
        ({"support": "both", "top_k": 4}, "support"),
        ({"outside": "drop", "top_k": 4}, "outside"),
        ({"weight": 1.5}, "weight"),
        ({"kind": "jsd", "weight": 0.0}, "weight"),
        ({"top_k": 0}, "top_k"),
        ({"outside": "tail"}, "top_k"),
    ],
)
def test_divergence_names_the_wrong_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Divergence(**fields)


@pytest.mark.parametrize(
    ("divergence", "stored", "field"),
    [
        (Divergence(top_k=12), False, "top_k=12: must be from 1 to 11, the size of the vocabulary"),
        (Divergence(top_k=12), True, "top_k=12: must be from 1 to 11, the size of the vocabulary"),
        (Divergence(top_k=5), True, "top_k=5: must be from 1 to 4, the size of the teacher's stored top-k"),
        (Divergence(), True, "top_k"),
        (Divergence(top_k=4, support="student"), True, "support"),
    ],
)
def test_a_teacher_that_cannot_serve_is_refused(divergence: Divergence, stored: bool, field: str) -> None:
    case = Case()
    with pytest.raises(ValueError, match=field):
        case.head(divergence, case.stored(4) if stored else None)


def test_wrong_arguments_of_the_heads_are_named() -> None:
    case = Case()
    with pytest.raises(ValueError, match="num_tokens"):
        case.head(None, num_tokens=0.0)
    with pytest.raises(ValueError, match="chunk_size"):
        case.head(None, chunk_size=0)
    with pytest.raises(ValueError, match="vocabulary"):
        case.head(Divergence(), HiddenTargets(case.teacher.hidden, case.teacher.weight[:-1]))


def test_the_command_line_builds_and_checks_a_divergence() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Divergence, "divergence")
    config = parser.parse_args(["--divergence.kind=jsd", "--divergence.top_k=64", "--divergence.outside=tail"])
    assert parser.instantiate(config)["divergence"] == Divergence("jsd", top_k=64, outside="tail")
    with pytest.raises(ArgumentError, match="kind"):
        parser.parse_args(["--divergence.kind=sideways"])
