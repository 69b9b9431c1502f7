"""Loss heads with low-precision operands, which CUDA multiplies as they are: the same code on the CPU, where matmuls
cast them to float32 first, and on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdzero.losses import Divergence, fused_linear, matmul
from sdzero.losses.reference import token_divergence
from sdzero.losses.soft_targets import HiddenTargets, top_k_targets
from support.loss_cases import HEADS, Case, Recorder, name_of

# A gradient of the logits is rounded to 2**-9 of itself before it meets head and hidden states.
ROUNDED: dict[torch.dtype, dict[str, Any]] = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 4e-3},
    torch.float16: {"rtol": 2**-10, "atol": 5e-4},
}


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "uses_cuda_matmul", lambda device: True)
    monkeypatch.setattr(matmul, "BLOCK_ELEMENTS", 48)


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Collect the dtypes of all matmul operands."""
    seen: set[torch.dtype] = set()

    def seeing(product: Callable[..., Any], first: int) -> Callable[..., Any]:
        def call(*args: Tensor) -> Any:
            seen.update(x.dtype for x in args[first : first + 2])
            return product(*args)

        return call

    for name, first in (("mm", 0), ("addmm_", 1)):
        monkeypatch.setattr(matmul, name, seeing(getattr(matmul, name), first))
    return seen


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", HEADS, ids=name_of)
def test_low_precision_operands_give_float32_values(
    divergence: Divergence | None, dtype: torch.dtype, operands: set[torch.dtype]
) -> None:
    case = Case(dtype=dtype)
    _, loss, grads = case.exact(divergence)
    out = case.head(divergence, chunk_size=3)
    assert operands == {dtype}
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    ours = case.grads(out.loss)
    assert [grad.dtype for grad in ours] == [dtype, dtype]
    torch.testing.assert_close([grad.double() for grad in ours], grads, **ROUNDED[dtype])


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("divergence", HEADS, ids=name_of)
def test_autocast_says_what_is_multiplied_and_gradients_stay_float32(
    divergence: Divergence | None, operands: set[torch.dtype]
) -> None:
    case, rounded = Case(dtype=torch.float32), Case(dtype=torch.bfloat16)
    rounded.token_weights = case.token_weights
    _, loss, grads = rounded.exact(divergence)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.head(divergence, chunk_size=3)
    assert operands == {torch.bfloat16}
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    ours = case.grads(out.loss)
    assert [grad.dtype for grad in ours] == [torch.float32, torch.float32]
    torch.testing.assert_close([grad.double() for grad in ours], grads, **ROUNDED[torch.bfloat16])


@pytest.mark.usefixtures("as_on_cuda")
def test_hidden_states_without_autocast_say_what_is_multiplied() -> None:
    low, single, double = (Case(dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    for hidden, weight, expected in (
        (low, single, torch.bfloat16),
        (single, low, torch.float32),
        (single, single, torch.float32),
        (low, double, torch.float64),
    ):
        out = matmul.result_dtype(hidden.hidden, weight.weight)
        assert matmul.operand_dtype(hidden.hidden, weight.weight, out) == expected


def test_the_cpu_multiplies_in_float32() -> None:
    case = Case(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        projection = fused_linear.Projection(case.hidden, case.weight, 3, torch.float32)
    assert projection.weight.dtype == torch.float32
    assert projection.logits(slice(0, 3)).dtype == torch.float32


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("divergence", [None, Divergence(), Divergence(top_k=4)], ids=name_of)
def test_a_share_of_a_large_batch_does_not_vanish_in_float16(divergence: Divergence | None) -> None:
    case = Case(dtype=torch.float16)
    num_tokens = 1e7  # float16 holds nothing below 6e-8
    _, _, grads = case.exact(divergence, num_tokens)
    loss = case.head(divergence, num_tokens=num_tokens).loss * 2.0**23  # as a gradient scaler does after the head
    ours = [grad.double() / 2.0**23 * num_tokens for grad in case.grads(loss)]
    torch.testing.assert_close(ours, [grad * num_tokens for grad in grads], rtol=2**-9, atol=3e-3)


@pytest.mark.usefixtures("as_on_cuda")
def test_logits_of_low_precision_would_cancel_where_student_and_teacher_agree() -> None:
    case = Case(n=8, vocab=500, hidden=32, dtype=torch.bfloat16)
    near = case.hidden.detach().clone()
    near[:, :4] *= 1 + 2**-7  # one step of bfloat16 in four places
    case.teacher = HiddenTargets(near, case.weight.detach())
    student, teacher = (h.detach().double() @ case.weight.detach().double().T for h in (case.hidden, near))
    expected = token_divergence(student, teacher, Divergence())
    ours = case.head(Divergence()).metrics["divergence"]
    student, teacher = ((h @ case.weight.T).detach().float() for h in (case.hidden, near))
    bare = token_divergence(student, teacher, Divergence())
    off, bare_off = (float(((values - expected).abs() / expected).mean()) for values in (ours, bare))
    assert off < 0.01
    assert bare_off > 30 * off


@pytest.mark.usefixtures("as_on_cuda")
def test_a_kept_teacher_of_low_precision_is_the_hidden_one() -> None:
    case = Case(dtype=torch.bfloat16)
    kept = top_k_targets(case.teacher.hidden, case.teacher.weight, case.targets, 4, 3)
    hidden = case.head(Divergence(top_k=4), chunk_size=3)
    stored = case.head(Divergence(top_k=4), kept, chunk_size=3)
    assert kept.logprobs.dtype == torch.float32
    assert torch.equal(stored.loss, hidden.loss)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("divergence", HEADS, ids=name_of)
def test_float32_on_cuda_takes_other_products_to_the_same_values(divergence: Divergence | None) -> None:
    case = Case(dtype=torch.float32)
    _, loss, grads = case.exact(divergence)
    out = case.head(divergence, chunk_size=3)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([grad.double() for grad in case.grads(out.loss)], grads, rtol=1e-4, atol=1e-6)


def test_columns_are_gathered_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "uses_cuda_matmul", lambda device: True)
    monkeypatch.setattr(matmul, "BLOCK_ELEMENTS", 4 * 8 * 2)  # two rows of four columns
    case = Case(n=32, vocab=40, hidden=8, dtype=torch.float32)
    teacher = case.stored(4)
    with Recorder() as recorder:
        case.head(Divergence(top_k=4), teacher, chunk_size=32).loss.backward()
    assert recorder.largest <= 40 * 8  # the head's own gradient; all columns at once would be 32 * 4 * 8


def test_the_chunk_is_the_devices() -> None:
    hidden = torch.zeros(1, 2)
    assert matmul.chunk_size(None, hidden) == 256
    assert matmul.chunk_size(7, hidden) == 7
    assert matmul.ACCELERATOR_BLOCK_ELEMENTS * 2 < 2048 * 64 * 2560  # bfloat16 columns of a chunk, all at once


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", HEADS, ids=name_of)
def test_heads_on_the_device_equal_the_reference(divergence: Divergence | None, dtype: torch.dtype) -> None:
    case = Case(n=70, vocab=1000, hidden=32, scale=0.3, dtype=dtype, device="cuda")
    _, loss, grads = case.exact(divergence)
    out = case.head(divergence, chunk_size=32)
    torch.testing.assert_close(out.loss.double().cpu(), loss, rtol=1e-5, atol=1e-5)
    for ours, grad in zip(case.grads(out.loss), grads, strict=True):
        assert (ours.double().cpu() - grad).norm() < grad.norm() * (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", [None, Divergence(), Divergence("jsd"), Divergence(top_k=64)], ids=name_of)
def test_autocast_on_the_device_multiplies_in_bfloat16(divergence: Divergence | None) -> None:
    case = Case(n=70, vocab=1000, hidden=32, dtype=torch.float32, device="cuda")
    rounded = Case(n=70, vocab=1000, hidden=32, dtype=torch.bfloat16)
    rounded.token_weights = case.token_weights.cpu()
    _, loss, _ = rounded.exact(divergence)
    with torch.autocast("cuda", torch.bfloat16):
        out = case.head(divergence)
    torch.testing.assert_close(out.loss.double().cpu(), loss, rtol=1e-5, atol=1e-5)
    assert [grad.dtype for grad in case.grads(out.loss)] == [torch.float32, torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", [None, Divergence(), Divergence(top_k=64), Divergence(top_k=64, outside="tail")])
def test_a_head_on_the_device_never_holds_all_logits(divergence: Divergence | None) -> None:
    n, vocab, hidden, chunk = 16_384, 32_768, 256, 1024
    case = Case(n, vocab, hidden, scale=0.1, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.head(divergence, chunk_size=chunk).loss.backward()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    whole, of_chunk = 4 * n * vocab, 4 * chunk * vocab
    assert used < min(whole / 2, 6 * of_chunk + 3 * 4 * vocab * hidden + 3 * 4 * n * hidden + 2**28)
