"""PolicyGradient against whole logits in float64, and its advantages in closed form."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdzero.losses import PolicyLoss
from sdzero.losses.reference import policy_loss
from sdzero.methods import PolicyGradient
from sdzero.methods.policy_gradient import group_advantages
from sdzero.models.language_model import ModelConfig
from sdzero.models.lora import Lora
from sdzero.prompts import PromptBuilder
from sdzero.types import Question, RolloutBatch, Sampling, ScoredRollout
from support.helpers import Steps, Stored, fit, make_scored, make_trainer, plain_model, same, weights_of


@pytest.fixture(scope="module")
def other(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference that differs from the student from the first step: the same model with noise on its weights."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(path, folder, dirs_exist_ok=True)
    weights, rng = load_file(path / "model.safetensors"), torch.Generator().manual_seed(1)
    noisy = {name: w + 0.01 * torch.randn(w.shape, generator=rng) for name, w in weights.items()}
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def groups(builder: PromptBuilder) -> list[list[ScoredRollout]]:
    """Three questions with four responses each: one right, three right, none right; one response is truncated."""
    answers = {
        "1+1=": (("2", 1), ("it is 3", 0), ("Wait, wait, it is", 0), ("4 " * 7, 0)),
        "3+4=": (("7", 1), ("so 7", 1), ("the answer is 7", 1), ("8", 0)),
        "5+5=": (("1", 0), ("2 and 3", 0), ("no answer is this", 0), ("4", 0)),
    }
    return [
        [make_scored(builder, Question(f"q{i}", text, "x"), y, reward, cut=y.endswith("it is")) for y, reward in ys]
        for i, (text, ys) in enumerate(answers.items())
    ]


def batch_of(groups: list[list[ScoredRollout]], sampling: Sampling = Sampling()) -> RolloutBatch:
    return RolloutBatch([scored for group in groups for scored in group], 0, 0, sampling=sampling)


def run(
    path: Path, groups: list[list[ScoredRollout]], root: Path, sampling: Sampling = Sampling(), **options: Any
) -> tuple[PolicyGradient, Steps]:
    defaults: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "max_grad_norm": 0}
    method = PolicyGradient(ModelConfig(str(path)), **{**defaults, **options})
    return method, fit(method, [batch_of(groups, sampling)], root)


# --- advantages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "num_right", "right", "wrong"),
    [(4, 1, 1.5, -0.5), (4, 2, 0.8660, -0.8660), (4, 3, 0.5, -1.5), (8, 1, 2.4749, -0.3536), (8, 2, 1.6202, -0.5401)],
)
def test_advantages_of_a_binary_reward(num: int, num_right: int, right: float, wrong: float) -> None:
    rewards = [1] * num_right + [0] * (num - num_right)
    expected = [right] * num_right + [wrong] * (num - num_right)
    assert group_advantages(rewards, "group_std") == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=9), st.floats(-5, 5), st.floats(0.1, 10))
def test_advantages_are_centred_and_compare_rewards(rewards: list[float], shift: float, scale: float) -> None:
    std, mean, others = (group_advantages(rewards, kind) for kind in ("group_std", "group_mean", "leave_one_out"))
    for advantages in (std, mean, others):
        assert sum(advantages) == pytest.approx(0, abs=1e-9)
    num = len(rewards)
    assert others == pytest.approx([r - (sum(rewards) - r) / (num - 1) for r in rewards])
    assert others == pytest.approx([num / (num - 1) * a for a in mean])
    assert group_advantages([shift + r for r in rewards], "group_mean") == pytest.approx(mean, abs=1e-9)
    assert group_advantages([scale * r for r in rewards], "group_std") == pytest.approx(std, rel=1e-3, abs=1e-3)
    if len({*rewards}) == 1:
        assert std == pytest.approx([0.0] * num, abs=1e-9)


def test_half_the_penalty_on_rewards_of_0_and_1_is_the_whole_on_plus_and_minus_1() -> None:
    penalties = [0.0, 0.2, 0.5, 1.0]
    binary = [r - 0.5 * p for r, p in zip((1, 0, 1, 0), penalties, strict=True)]
    signed = [r - p for r, p in zip((1, -1, 1, -1), penalties, strict=True)]
    assert group_advantages(binary, "group_std") == pytest.approx(group_advantages(signed, "group_std"), rel=1e-5)


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [60, 8192])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum", "sequence_mean"])
def test_the_loss_is_that_of_whole_logits(
    path: Path,
    other: Path,
    groups: list[list[ScoredRollout]],
    tmp_path: Path,
    reduction: str,
    temperature: float,
    max_tokens: int,
) -> None:
    """Loss, gradients and metrics, with a reference and an entropy bonus, in one micro batch and in several."""
    loss = PolicyLoss(kl_coef=0.3, entropy_coef=0.1)
    options = {"policy_loss": loss, "reference": ModelConfig(str(other)), "reduction": reduction}
    options["max_tokens_per_micro_batch"] = max_tokens
    _, steps = run(path, groups, tmp_path, Sampling(temperature, 1.0, 64), **options)
    model, reference = plain_model(path), plain_model(other)
    per_row, means = [], {"entropy": [], "kl": []}
    for group in groups:
        for scored, advantage in zip(
            group, group_advantages([s.verdict.reward for s in group], "group_std"), strict=True
        ):
            context, target = scored.rollout.prompt.token_ids, scored.rollout.token_ids
            rows = torch.tensor([[*context, *target]])
            log_p = (model(rows).logits[0, len(context) - 1 : -1] / temperature).log_softmax(-1)
            with torch.no_grad():
                log_r = (reference(rows).logits[0, len(context) - 1 : -1] / temperature).log_softmax(-1)
            ids = torch.tensor(target)[:, None]
            own, ref = log_p.gather(1, ids).squeeze(1), log_r.gather(1, ids).squeeze(1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            advantages = torch.full((len(target),), advantage, dtype=torch.float64)
            per_row.append(policy_loss(own, own, advantages, ref, entropy, loss))
            means["entropy"].append(entropy.detach())
            means["kl"].append(((ref - own).exp() - (ref - own) - 1).detach())
    num_tokens = sum(map(len, per_row))
    expected = {
        "token_mean": sum(row.sum() for row in per_row) / num_tokens,
        "sequence_sum": sum(row.sum() for row in per_row) / len(per_row),
        "sequence_mean": sum(row.mean() for row in per_row) / len(per_row),
    }[reduction]
    assert isinstance(expected, torch.Tensor)
    assert steps.metrics[0]["train/loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert steps.metrics[0]["train/entropy"] == pytest.approx(torch.cat(means["entropy"]).mean().item(), rel=1e-4)
    assert steps.metrics[0]["train/kl_reference"] == pytest.approx(torch.cat(means["kl"]).mean().item(), rel=1e-4)
    assert steps.metrics[0]["train/clip_fraction"] == 0
    shares = [steps.metrics[0][f"rollout/{name}"] for name in ("all_wrong", "all_right")]
    assert shares == pytest.approx([1 / 3, 0])
    expected.backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in steps.gradients[0].items():
        torch.testing.assert_close(gradient.double(), exact[name], rtol=2e-3, atol=2e-6)


def test_groups_without_variance_teach_nothing(path: Path, groups: list[list[ScoredRollout]], tmp_path: Path) -> None:
    """Dropped, a step of them is skipped; kept, they dilute the token mean of the others."""
    sgd: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    before, _ = run(path, groups[:1], tmp_path)
    for zero_variance in ("drop", "keep"):
        method, _ = run(path, groups[2:], tmp_path, zero_variance=zero_variance, **sgd)
        assert same(weights_of(before.student), weights_of(method.student)), zero_variance
    gradients = {}
    for zero_variance in ("drop", "keep"):
        _, steps = run(path, groups, tmp_path, zero_variance=zero_variance)
        gradients[zero_variance] = steps.gradients[0]
    num_tokens = [sum(len(s.rollout.token_ids) for g in kept for s in g) for kept in (groups[:2], groups)]
    for name, gradient in gradients["keep"].items():
        dropped = gradients["drop"][name] * num_tokens[0] / num_tokens[1]
        torch.testing.assert_close(gradient, dropped, rtol=1e-4, atol=1e-7)


def test_the_penalty_alone_moves_the_student_to_its_reference(
    path: Path, other: Path, groups: list[list[ScoredRollout]], tmp_path: Path
) -> None:
    """Kept groups without variance and k3: its mean falls; at the reference itself nothing moves."""
    options: dict[str, Any] = {"policy_loss": PolicyLoss(kl_coef=1.0)}
    start, _ = run(path, groups[2:], tmp_path)
    still, steps = run(path, groups[2:], tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **options)
    assert steps.metrics[0]["train/kl_reference"] == pytest.approx(0, abs=1e-6)
    moved = [(a - b).abs().max() for a, b in zip(start.student.parameters(), still.student.parameters(), strict=True)]
    assert max(moved) < 1e-6
    method = PolicyGradient(
        ModelConfig(str(path)),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        reference=ModelConfig(str(other)),
        **options,
    )
    batches = [RolloutBatch(batch_of(groups[2:]).scored, step, step) for step in range(4)]
    kl = fit(method, batches, tmp_path).curve("train/kl_reference")
    assert kl == sorted(kl, reverse=True) and kl[-1] < 0.9 * kl[0]


def test_adapters_have_their_base_as_reference(path: Path, groups: list[list[ScoredRollout]], tmp_path: Path) -> None:
    method = PolicyGradient(
        ModelConfig(str(path), lora=Lora(rank=4)),
        optimizer=lambda p: torch.optim.SGD(p, lr=5.0),
        policy_loss=PolicyLoss(kl_coef=0.1),
    )
    batches = [RolloutBatch(batch_of(groups).scored, step, step) for step in range(3)]
    kl = fit(method, batches, tmp_path).curve("train/kl_reference")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-6
    assert not hasattr(method, "teacher") and method.shares_base


def test_truncated_responses_count_in_their_group_alone(
    path: Path, builder: PromptBuilder, groups: list[list[ScoredRollout]]
) -> None:
    method = PolicyGradient(ModelConfig(str(path)), mask_truncated=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "_log", lambda *_: None)
        patch.setattr(method, "reduce", lambda tensor, op: tensor)
        examples = method.examples(batch_of(groups[:1]))
    assert [e.advantage for e in examples] == pytest.approx([1.5, -0.5, -0.5], abs=1e-4)


def test_overlong_responses_lose_reward_and_variance_is_that_of_the_verdicts(
    path: Path, groups: list[list[ScoredRollout]]
) -> None:
    sampling = Sampling(max_new_tokens=20)
    options: dict[str, Any] = {"overlong_buffer": 8, "overlong_factor": 0.5, "zero_variance": "drop"}
    method = PolicyGradient(ModelConfig(str(path)), **options)
    method.sampling = sampling
    penalties = [method.length_penalty(n) for n in (0, 12, 14, 16, 20)]
    assert penalties == pytest.approx([0, 0, 0.125, 0.25, 0.5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "_log", lambda *_: None)
        patch.setattr(method, "reduce", lambda tensor, op: tensor)
        assert method.examples(batch_of(groups[2:], sampling)) == [], "its lengths differ, its verdicts do not"
        shaped = [e.advantage for e in method.examples(batch_of(groups[:1], sampling))]
    lengths = [len(scored.rollout.token_ids) for scored in groups[0]]
    rewards = [s.verdict.reward - 0.5 * max(n - 12, 0) / 8 for s, n in zip(groups[0], lengths, strict=True)]
    assert max(lengths) > 12 and shaped == pytest.approx(group_advantages(rewards, "group_std"))


def test_what_cannot_be_compared_is_refused(path: Path, groups: list[list[ScoredRollout]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 2, got \[1\]"):
        run(path, [group[:1] for group in groups], tmp_path)
    with pytest.raises(ValueError, match=r"as many of each question, at least 2, got \[3, 4\]"):
        run(path, [groups[0][:3], groups[1]], tmp_path)
    with pytest.raises(ValueError, match="reference is for policy_loss.kl_coef"):
        PolicyGradient(ModelConfig(str(path)), reference=ModelConfig(str(path)))
    with pytest.raises(ValueError, match="overlong_buffer"):
        PolicyGradient(ModelConfig(str(path)), overlong_buffer=-1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rollouts_per_prompt", 1, "data.rollouts_per_prompt: .*at least 2, got 1"),
        ("overlap", True, r"data\.overlap: .*set it to false"),
        ("sampling", Sampling(temperature=0), "data.sampling.temperature: .*above 0"),
    ],
)
def test_data_that_cannot_serve_is_refused_before_weights_are_loaded(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, message: str
) -> None:
    data = Stored([])
    setattr(data, key, value)
    monkeypatch.setattr("sdzero.methods.policy.load", None)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(PolicyGradient(ModelConfig(str(path))), datamodule=data)
