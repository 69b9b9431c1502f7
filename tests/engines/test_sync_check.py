from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sdzero.engines.base import EngineError
from sdzero.engines.sync_check import SyncCheck, WeightLayout, fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def slow_fingerprint(tensor: torch.Tensor) -> int:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    size = tensor.element_size()
    bits = [int.from_bytes(raw[i : i + size], "little", signed=True) for i in range(0, len(raw), size)]
    return sum(value * (2 * place + 1) for place, value in enumerate(bits)) % 2**64


@given(st.integers(0, 2**31), st.sampled_from(DTYPES), st.integers(1, 5), st.integers(1, 7))
def test_fingerprint_is_the_documented_sum(seed: int, dtype: torch.dtype, rows: int, columns: int) -> None:
    tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert fingerprint(tensor) == slow_fingerprint(tensor)
    assert fingerprint(tensor.t()) == slow_fingerprint(tensor.t().contiguous())


def test_fingerprint_continues_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = fingerprint(tensor)
    monkeypatch.setattr("sdzero.engines.sync_check._CPU_CHUNK", 7)
    assert fingerprint(tensor) == whole == slow_fingerprint(tensor)


@given(st.integers(0, 99), st.integers(0, 31), st.integers(0, 98))
def test_fingerprint_detects_one_bit_and_any_swap(place: int, bit: int, other: int) -> None:
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(0))
    flipped = tensor.clone()
    flipped.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(2**31)
    assert fingerprint(flipped) != fingerprint(tensor)
    swapped = tensor.clone()
    swapped[[place, other]] = tensor[[other, place]]
    assert (fingerprint(swapped) == fingerprint(tensor)) == (place == other)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4, bias=False)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def test_layout_includes_second_names() -> None:
    layout = WeightLayout.of(Tied())
    assert layout.required == {"embed_tokens.weight", "norm.weight"}
    assert set(layout.shapes) == {*layout.required, "lm_head.weight"}


def test_a_padded_vocabulary_is_compared_without_its_padding_in_the_dtype_held() -> None:
    model = Tied()
    padded = torch.zeros(8, 4, dtype=torch.bfloat16)
    held = {"embed_tokens.weight": padded, "norm.weight": torch.zeros(4)}  # an engine may keep norms in float32
    check = SyncCheck(WeightLayout.of(model), held, torch.bfloat16)
    for name, tensor in check.watch(model.named_parameters()):
        assert not tensor.requires_grad
        held[name][: tensor.shape[0]] = tensor
    assert len(check.finish(held)) == 16
    padded[5, 3] += 0.01
    with pytest.raises(EngineError, match=r"'embed_tokens\.weight' of the engine differs"):
        check.finish(held)


def test_the_checksum_covers_fused_weights() -> None:
    """Fused projections are not compared, but the checksum differs (a LoRA trains nothing else)."""
    layout = WeightLayout({"norm.weight": torch.Size([4]), "q_proj.weight": torch.Size([4, 4])}, frozenset())
    checksums = set()
    for scale in (1.0, 1.0, 1.5):
        held = {"norm.weight": torch.ones(4)}
        check = SyncCheck(layout, held, torch.float32)
        list(check.watch([("norm.weight", torch.ones(4)), ("q_proj.weight", scale * torch.eye(4))]))
        checksums.add(check.finish(held))
    assert len(checksums) == 2


def test_nothing_to_compare_is_no_proof() -> None:
    layout = WeightLayout({"q_proj.weight": torch.Size([4, 4])}, frozenset({"q_proj.weight"}))
    check = SyncCheck(layout, {}, torch.float32)
    list(check.watch([("q_proj.weight", torch.eye(4))]))
    with pytest.raises(EngineError, match="no tensor in a form that can be compared"):
        check.finish({})


def test_faults_do_not_stop_the_stream() -> None:
    """Other ranks gather the same weights: this one consumes them all before it raises."""
    seen: list[str] = []

    def weights():
        for name, tensor in [("odd.weight", torch.zeros(1)), *Tied().named_parameters()]:
            seen.append(name)
            yield name, tensor

    check = SyncCheck(WeightLayout.of(Tied()), {}, torch.float32)
    assert [name for name, _ in check.watch(weights())] == seen[1:] and len(seen) == 3
    with pytest.raises(EngineError, match=r"'odd\.weight' is not a weight"):
        check.finish({})


def test_a_projection_that_keeps_its_name_and_shape_is_compared() -> None:
    """Adapters change nothing else: a skipped copy must show in it. Fused, packed and cut ones are left alone."""
    names = ("mlp.down_proj.weight", "attn.o_proj.weight", "attn.q_proj.weight")
    layout = WeightLayout(dict.fromkeys(names, torch.Size([4, 6])), frozenset(names))
    held = {names[0]: torch.zeros(4, 6), names[1]: torch.zeros(4, 3)}  # engines fuse q_proj; o_proj is cut in two
    check = SyncCheck(layout, held, torch.float32)
    for name, tensor in check.watch((name, torch.full((4, 6), 1e-9)) for name in names):
        if name == names[0]:
            held[name].copy_(tensor)
    assert check.finish(held)
    held[names[0]][3, 5] = 0
    with pytest.raises(EngineError, match=r"'mlp\.down_proj\.weight' of the engine differs.*\(1 such faults, 1 "):
        check.finish(held)
