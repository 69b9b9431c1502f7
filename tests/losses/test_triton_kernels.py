"""The Triton kernels: their values in Triton's interpreter, their compilation for a GPU, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when it is imported, so one process runs this file as a program and makes the values of
all cases, through the functions that CUDA would call.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sdzero.losses import Divergence, Kind, matmul, row_ops
from sdzero.losses.reference import surprisal, token_divergence
from sdzero.losses.soft_targets import top_k_targets
from support.loss_cases import KINDS, Case

SHARE = 0.3
ROWS = 5
TEMPERATURE, BONUS = 0.7, 0.3  # of the policy gradient
Result = dict[str, Tensor]


def need_triton() -> None:
    """It comes with vLLM: beside one it must be there, and the tests run."""
    if find_spec("vllm") is None:
        pytest.importorskip("triton", reason="no Triton on this machine, which has no vLLM to bring it")


@dataclass(frozen=True)
class Rows:
    """Random rows of logits of size `spread`; `noise` is the teacher's distance from the student, None if unrelated."""

    kind: Kind | Literal["policy"] | None  # None is cross-entropy
    block: int = 64
    vocab: int = 300
    spread: float = 3.0
    noise: float | None = None
    grad_dtype: torch.dtype = torch.float32
    bare: bool = False  # neither targets nor a gradient

    @property
    def tensors(self) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(1)
        student = torch.randn(ROWS, self.vocab, generator=rng) * self.spread
        other = torch.randn(ROWS, self.vocab, generator=rng)
        teacher = other * self.spread if self.noise is None else student + other * self.noise
        scale = torch.rand(ROWS, generator=rng)
        scale[2] = 0
        targets = torch.randint(self.vocab, (ROWS,), generator=rng)
        targets[:2] = torch.tensor([0, self.vocab - 1])
        return {"student": student, "teacher": teacher, "scale": scale, "targets": targets}

    def run(self, through: Any, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Result:
        """What triton_kernels.py or row_ops.py makes of the rows."""
        tensors = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in self.tensors.items()}
        logits, teacher, targets = tensors["student"], tensors["teacher"], tensors["targets"]
        scale = None if self.bare else tensors["scale"]
        grad_dtype = self.grad_dtype if dtype == torch.float32 else dtype
        if self.kind is None:
            values, grad = through.cross_entropy(logits, targets, scale, grad_dtype)
            of_targets = []
        elif self.kind == "policy":
            values, grad = through.policy_gradient(logits, targets, reinforce, TEMPERATURE, BONUS, scale, grad_dtype)
            of_targets = []
        else:
            wanted = None if self.bare else targets
            values, grad, of_targets = through.divergence(self.kind, SHARE, logits, teacher, wanted, scale, grad_dtype)
        named = {"values": values, "gradient": grad, **dict(zip(("student", "teacher"), of_targets, strict=False))}
        return {name: x.to("cpu", copy=True) for name, x in named.items() if x is not None}


def reinforce(logprobs: Tensor, entropy: Tensor, block: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Return the loss of each token with advantages of both signs and an entropy bonus, and its slope."""
    advantages = torch.linspace(-2, 2, ROWS).to(logprobs)[block]
    return -advantages * logprobs - BONUS * entropy, -advantages


VARIANTS: list[dict[str, Any]] = [
    {},
    {"block": 512},
    {"block": 16, "vocab": 96},
    {"spread": 1e4},
    {"spread": 30.0, "noise": 1e-2},
    {"grad_dtype": torch.bfloat16},
    {"bare": True},
]
CASES = [Rows(kind, **variant) for kind in (None, "policy", *KINDS) for variant in VARIANTS]


def expected_of(case: Rows) -> Result:
    """By the definitions, in float64."""
    double = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors.items()}
    student, teacher, targets = double["student"].requires_grad_(), double["teacher"], double["targets"]
    log_s, log_t = (-surprisal(x, targets).detach() for x in (student, teacher))
    if case.kind is None:
        values = surprisal(student, targets)
    elif case.kind == "policy":
        log_probs = (student / TEMPERATURE).log_softmax(-1)
        values, _ = reinforce(-surprisal(student / TEMPERATURE, targets), -(log_probs.exp() * log_probs).sum(-1))
    else:
        values = token_divergence(student, teacher, Divergence(case.kind, SHARE))
    (gradient,) = torch.autograd.grad((values * double["scale"]).sum(), student)
    return {"values": values.detach(), "gradient": gradient, "student": log_s, "teacher": log_t}


def check(case: Rows, made: Result) -> None:
    """As close to the reference as the eager rows are in float32, or to the last bits of the sums."""
    expected, eager = expected_of(case), case.run(row_ops)
    assert made.keys() == ({"values"} if case.bare else eager.keys())
    for name, value in made.items():
        assert torch.isfinite(value).all()
        size = max(1.0, float(expected[name].abs().max())) if name != "gradient" else 1.0
        floor = max(3e-7 * size, 1.5 * float((eager[name].double() - expected[name]).abs().max()))
        rounding = 2**-7 if value.dtype == torch.bfloat16 else 1e-5  # the interpreter rounds towards 0
        torch.testing.assert_close(value.double(), expected[name], rtol=rounding, atol=floor, msg=f"{case} {name}")
    if "gradient" in made:
        assert made["gradient"].dtype == case.grad_dtype
        assert (made["gradient"][2] == 0).all()  # scale 0


HEADS = [None, *(Divergence(kind, SHARE) for kind in KINDS), Divergence(top_k=4, outside="tail")]


def run_head(divergence: Divergence | None, dtype: torch.dtype, device: str = "cpu") -> Result:
    """A whole head, and a kept teacher, of a small case."""
    case = Case(dtype=dtype, device=device)
    out = case.head(divergence, chunk_size=3, targets=case.targets)
    kept = top_k_targets(case.teacher.hidden, case.teacher.weight, case.targets, 4, 3)
    hidden, weight = case.grads(out.loss)
    logprobs = kept.logprobs.sort().values
    made = {"loss": out.loss.detach(), "hidden": hidden, "weight": weight, "kept": logprobs, **out.metrics}
    return {name: value.cpu() for name, value in made.items()}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Result], list[Result]]:
    """What the interpreter made of CASES, and of HEADS in float32 and bfloat16."""
    need_triton()
    out = tmp_path_factory.mktemp("kernels") / "results.pt"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])  # finds tests/support
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(out)


def interpret(out: str) -> None:
    from sdzero.losses import triton_kernels

    rows = []
    for case in CASES:
        triton_kernels.BLOCK = case.block
        rows.append(case.run(triton_kernels))
    row_ops.kernels_for = lambda logits: triton_kernels if logits.dtype == torch.float32 else None
    matmul.uses_cuda_matmul = lambda device: True
    heads = [run_head(head, dtype) for head in HEADS for dtype in (torch.float32, torch.bfloat16)]
    torch.save((rows, heads), out)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"{CASES[i].kind}-{i % len(VARIANTS)}")
def test_kernels_equal_the_reference(interpreted: tuple[list[Result], list[Result]], index: int) -> None:
    check(CASES[index], interpreted[0][index])


@pytest.mark.parametrize("index", range(len(HEADS)))
def test_heads_through_the_kernels_equal_the_eager_heads(
    interpreted: tuple[list[Result], list[Result]], index: int
) -> None:
    for offset, dtype in enumerate((torch.float32, torch.bfloat16)):
        made, eager = interpreted[1][2 * index + offset], run_head(HEADS[index], dtype)
        assert made.keys() == eager.keys()
        for name, value in made.items():
            rounded = dtype == torch.bfloat16 and name in ("hidden", "weight")
            close: dict[str, Any] = {"rtol": 2**-6, "atol": 5e-3} if rounded else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(value, eager[name], **close, msg=f"{HEADS[index]} {dtype} {name}")


def test_triton_serves_float32_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_ops.kernels_for(torch.zeros(1, 2)) is None
    monkeypatch.setattr(row_ops, "find_spec", lambda name: None)
    assert row_ops._kernels.__wrapped__() is None
    monkeypatch.undo()
    need_triton()
    kernels = row_ops._kernels.__wrapped__()
    assert kernels is not None
    assert all(hasattr(kernels, name) for name in ("log_softmax_", "cross_entropy", "divergence", "policy_gradient"))


SWITCHES = ("JSD", "REVERSE", "FORWARD", "WITH_TARGETS", "WITH_GRAD")
COMPILED: list[tuple[str, dict[str, bool]]] = [
    ("_log_softmax", {}),
    ("_cross_entropy", {"WITH_GRAD": True}),
    ("_target_statistics", {}),
    ("_policy_gradient", {}),
    *(
        ("_divergence", {name: bool(value) for name, value in zip(SWITCHES, values, strict=True)})
        for values in ((0, 1, 0, 1, 1), (0, 0, 1, 0, 1), (0, 1, 1, 1, 0), (1, 0, 0, 1, 1))
    ),
]


@pytest.mark.parametrize(("name", "switches"), COMPILED)
def test_kernels_compile_for_a_gpu(
    name: str, switches: dict[str, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    need_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sdzero.losses import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"targets": "*i64", "grad": "*bf16", "vocab": "i32", "stride": "i32", "share": "fp32", "inverse": "fp32"}
    constants = {**switches, "BLOCK": triton_kernels.BLOCK}
    names = getattr(triton_kernels, name).arg_names
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "*fp32") for arg in names}
    source = ASTSource(getattr(triton_kernels, name), signature, {(names.index(k),): v for k, v in constants.items()})
    options = {"num_warps": triton_kernels.WARPS, "enable_fp_fusion": False}
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_reference_on_the_device(case: Rows) -> None:
    kernels = row_ops._kernels()
    assert kernels is not None
    check(case, case.run(kernels, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "policy", *KINDS])
def test_kernels_equal_eager_rows_of_a_real_vocabulary(kind: Any) -> None:
    case = Rows(kind, vocab=151_936)
    check(case, case.run(row_ops, device="cuda"))


if __name__ == "__main__":
    interpret(sys.argv[1])
