"""Sentences about the results."""

from __future__ import annotations

import pytest

from sdzero.report.results import Evaluated, headline


@pytest.mark.parametrize(
    ("gain", "error", "words"),
    [
        (0.1, 0.02, "SRT: avg@8 rose from 0.500 to 0.600 (+0.100 ±\xa00.020)"),
        (-0.1, 0.02, "SRT: avg@8 fell from 0.500 to 0.400 (−0.100 ±\xa00.020)"),
        (0.039, 0.02, "SRT: no clear change of avg@8, from 0.500 to 0.539 (+0.039 ±\xa00.020, within two standard err"),
        (0.1, None, "SRT: avg@8 changed from 0.500 to 0.600 (+0.100, without an error"),
    ],
)
def test_a_gain_is_one_above_two_standard_errors(gain: float, error: float | None, words: str) -> None:
    rewards = {f"q/{i}": [0] * 8 for i in range(600)}
    row = {"accuracy": 0.5, "accuracy_se": 0.01, "accuracy_gain": None, "mean_response_tokens": 30.0}
    change = {"accuracy": 0.5 + gain, "accuracy_gain": gain, "accuracy_gain_se": error, "mean_response_tokens": 12.0}
    base = Evaluated("base", row, {}, rewards)
    first, second = headline([base, Evaluated("SRT", {**row, **change}, {}, rewards, base)])
    assert first == "base: avg@8 is 0.500 ±\xa00.010 on 600 held-out questions."
    assert second.startswith(words) and second.endswith("with 40% of the tokens of base (30 → 12).")
