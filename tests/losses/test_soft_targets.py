"""Teachers stored as their top-k: the same losses as from their hidden states."""

from __future__ import annotations

import pytest
import torch

from sdzero.losses import Divergence, Kind, Outside
from sdzero.losses.soft_targets import HiddenTargets, TopKTargets, top_k_targets
from support.loss_cases import KINDS, OUTSIDES, Case, Recorder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", OUTSIDES)
def test_a_longer_stored_top_k_teacher_equals_the_hidden_one(kind: Kind, outside: Outside) -> None:
    case = Case()
    divergence = Divergence(kind, top_k=4, outside=outside)
    hidden = case.head(divergence, chunk_size=3)
    top_k = case.head(divergence, case.stored(6), targets=case.targets, chunk_size=3)
    torch.testing.assert_close(top_k.loss, hidden.loss)
    torch.testing.assert_close(case.grads(top_k.loss), case.grads(hidden.loss))
    torch.testing.assert_close(top_k.metrics["top_k_mass"], hidden.metrics["top_k_mass"])
    student = set() if outside == "renormalize" else {"student_logprobs"}
    assert top_k.metrics.keys() == {"divergence", "top_k_mass"} | student


def kept_teacher(case: Case, top_k: int, chunk_size: int | None = 3) -> TopKTargets:
    return top_k_targets(case.teacher.hidden, case.teacher.weight, case.targets, top_k, chunk_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", OUTSIDES)
def test_a_teacher_kept_as_its_top_k_is_the_hidden_one_to_the_last_bit(
    kind: Kind, outside: Outside, dtype: torch.dtype
) -> None:
    case = Case(dtype=dtype)
    divergence = Divergence(kind, top_k=4, outside=outside)
    hidden = case.head(divergence, targets=case.targets, chunk_size=3)
    kept = case.head(divergence, kept_teacher(case, 4), targets=case.targets, chunk_size=3)
    assert torch.equal(kept.metrics["teacher_logprobs"], hidden.metrics["teacher_logprobs"])
    assert torch.equal(kept.metrics["top_k_mass"], hidden.metrics["top_k_mass"])
    grads = zip(case.grads(kept.loss), case.grads(hidden.loss), strict=True)
    if outside == "tail":  # what is left of 1 is known to 1's precision
        close = 10 * torch.finfo(dtype).eps
        torch.testing.assert_close(kept.loss, hidden.loss, rtol=close, atol=close)
        for ours, theirs in grads:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * close)
    else:
        assert torch.equal(kept.metrics["divergence"], hidden.metrics["divergence"])
        assert torch.equal(kept.loss, hidden.loss)
        assert all(torch.equal(ours, theirs) for ours, theirs in grads)


def test_a_kept_teacher_is_made_chunk_by_chunk_without_a_gradient() -> None:
    case = Case(n=96, vocab=200, hidden=8)
    teacher = HiddenTargets(case.teacher.hidden.requires_grad_(), case.teacher.weight.requires_grad_())
    with Recorder() as recorder:
        kept = top_k_targets(teacher.hidden, teacher.weight, case.targets, 5, 16)
    assert recorder.largest <= 16 * 200
    log_probs = case.logits[1].log_softmax(-1).detach()
    torch.testing.assert_close(kept.logprobs.sort(descending=True).values, log_probs.topk(5).values)
    torch.testing.assert_close(log_probs.gather(1, kept.ids), kept.logprobs)
    assert kept.target_logprobs is not None
    torch.testing.assert_close(kept.target_logprobs, log_probs.gather(1, case.targets[:, None]).squeeze(1))
    assert not any(tensor.requires_grad for tensor in vars(kept).values())


def test_a_kept_teacher_of_no_tokens_and_of_too_many() -> None:
    case = Case(0)
    kept = kept_teacher(case, 4, None)
    out = case.head(Divergence(top_k=4), kept, targets=case.targets)
    assert out.loss.item() == 0.0
    assert out.metrics["teacher_logprobs"].shape == (0,)
    with pytest.raises(ValueError, match="top_k"):
        kept_teacher(case, 12)
    with pytest.raises(ValueError, match="chunk_size"):
        kept_teacher(case, 4, 0)
