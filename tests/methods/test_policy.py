"""Evaluation on a rank that has run out of questions, and of several benchmarks at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sdzero.cli.lightning import SDZeroCLI
from sdzero.data import Evaluation, EvaluationDataModule
from sdzero.evaluation.metrics import BenchmarkMetrics
from sdzero.methods import Policy
from sdzero.models.language_model import ModelConfig
from sdzero.tasks import Suite
from sdzero.types import EvalBatch, Prompt, Question, Sampling
from support.helpers import Notes, Toy, make_scored, make_trainer
from support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1, hidden_size=32)


def test_a_first_batch_without_questions_has_k_and_the_benchmarks(path: Path) -> None:
    """All ranks must reduce the same metrics, also one without a question in its first call."""
    method = Policy(ModelConfig(str(path)))
    names = ("a", "b")
    method.validation_step(EvalBatch([], 0, 0, 3, names), 0)
    group = [make_scored(method.builder, Question("b/q", "1+1=", "2"), "2", reward) for reward in (0, 1, 0)]
    method.validation_step(EvalBatch([group], 0, 1, 3, names), 1)
    a, b = method.eval_metrics
    assert isinstance(a, BenchmarkMetrics) and isinstance(b, BenchmarkMetrics)
    assert float(b.accuracy.compute()["pass_at_3"]) == 1 and math.isnan(a.accuracy.compute()["pass_at_3"])
    assert a.compute().keys() == b.compute().keys()
    assert method.eval_rewards == {"b/q": [0, 1, 0]}


def say(prompt: Prompt, seed: int) -> str:
    """Right where the answer is odd; cut where it is 3."""
    answer = prompt.question.answer
    return "1" * 99 if answer == "3" else f"so {answer}" if int(answer) % 2 else "no"


def evaluate(path: Path, root: Path, suite: Suite, num_questions: int | None) -> tuple[Policy, dict[str, float]]:
    settings = Evaluation(num_questions=num_questions, num_samples=2, sampling=Sampling(max_new_tokens=9), call_size=4)
    method, trainer = Policy(ModelConfig(str(path))), make_trainer(root)
    trainer.test(method, EvaluationDataModule(suite, Notes(say), settings, max_logprob_gap=99), verbose=False)
    return method, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_metrics_per_benchmark_and_averaged_by_hand(path: Path, tmp_path: Path) -> None:
    """x has four questions: right, wrong, cut, wrong; y has two: right, wrong. Both answers to a question are alike."""
    suite = Suite({"x": Toy(), "y": Toy()}, {"x": 4, "y": 2})
    method, metrics = evaluate(path, tmp_path, suite, None)
    assert method.eval_rewards == {f"x/eval-{i}": [int(i == 0)] * 2 for i in range(4)} | {
        f"y/eval-{i}": [int(i == 0)] * 2 for i in range(2)
    }
    of_x, of_y = ({name.removeprefix(f"eval/{b}/"): v for name, v in metrics.items() if f"/{b}/" in name} for b in "xy")
    assert of_x.keys() == of_y.keys() == {name.removeprefix("eval/") for name in metrics if name.count("/") == 1}
    errors = {"x": math.sqrt(0.75 / 3 / 4), "y": math.sqrt(0.5 / 1 / 2)}  # squares / (n - 1) / n
    expected_x = {"avg_at_k": 0.25, "pass_at_2": 0.25, "truncated": 0.25, "correct": 0.25, "wrong": 0.5}
    expected_y = {"avg_at_k": 0.5, "pass_at_2": 0.5, "truncated": 0.0, "correct": 0.5, "wrong": 0.5}
    expected_x |= {"avg_at_k_se": errors["x"], "pass_at_2_se": errors["x"], "timeout": 0.0}
    expected_y |= {"avg_at_k_se": errors["y"], "pass_at_2_se": errors["y"], "timeout": 0.0}
    assert {name: of_x[name] for name in expected_x} == pytest.approx(expected_x)
    assert {name: of_y[name] for name in expected_y} == pytest.approx(expected_y)
    for name in of_x:
        mean = (of_x[name] + of_y[name]) / 2
        both = math.hypot(of_x[name], of_y[name]) / 2 if name.endswith("_se") else mean
        assert metrics[f"eval/{name}"] == pytest.approx(both, rel=1e-6), name


def test_one_benchmark_has_its_metrics_without_its_name(path: Path, tmp_path: Path) -> None:
    _, metrics = evaluate(path, tmp_path, Suite({"x": Toy()}, 4), 3)
    assert metrics["eval/avg_at_k"] == pytest.approx(1 / 3)
    assert all(name.count("/") == 1 for name in metrics)


def test_a_policy_alone_is_not_trained(path: Path, tmp_path: Path) -> None:
    config = ["--config=configs/recipes/smoke/eval.yaml", f"--model.student.path={path}"]
    with pytest.raises(TypeError, match="Policy only evaluates: to train, use a method such as"):
        SDZeroCLI.main(["fit", *config, f"--trainer.default_root_dir={tmp_path}"])
