"""Token viewer: choice of responses, size, and the first wrong token."""

from __future__ import annotations

import random
from itertools import pairwise

import pandas as pd
import pytest

from sdzero.report import token_viewer
from sdzero.report.token_viewer import TokenViewer
from support.made_up_run import token_kl_row


def test_the_viewer_holds_the_largest_peaks_and_an_even_sample() -> None:
    rng = random.Random(0)
    rows = [token_kl_row(rng, ["a", "b", "c"], i % 2, step=i) for i in range(200)]
    frame = pd.DataFrame(rows)
    view = TokenViewer(frame)
    assert view.num_recorded == 200
    extreme, even = ([c for c in view.choices if c["is_extreme"] == kind] for kind in (True, False))
    assert view.choices == [*extreme, *even]
    assert [c["reward"] for c in extreme] == [0] * token_viewer.NUM_EXTREME[0] + [1] * token_viewer.NUM_EXTREME[1]
    for reward, num in token_viewer.NUM_EXTREME.items():
        peaks = sorted((max(row["kl"]) for row in rows if row["reward"] == reward), reverse=True)
        assert [c["peak"] for c in extreme if c["reward"] == reward] == pytest.approx(peaks[:num])
    steps = sorted(c["step"] for c in even)
    gaps = [after - before for before, after in pairwise(steps)]
    assert len(even) == token_viewer.NUM_EVEN and steps[0] < 20 and min(gaps) >= 8 and max(gaps) <= 16
    assert not {*steps} & {c["step"] for c in extreme}
    for choice, shown in zip(view.choices, view.data["responses"], strict=True):
        peak = max(t["kl"] for t in shown["tokens"])
        assert (shown["step"], peak) == pytest.approx((choice["step"], choice["peak"]), rel=1e-3)

    only_right = TokenViewer(frame.query("reward == 1"))
    assert sum(c["is_extreme"] for c in only_right.choices) == sum(token_viewer.NUM_EXTREME.values())
    assert len(TokenViewer(frame.head(3)).choices) == 3


def test_long_responses_keep_the_page_small() -> None:
    """A window around the largest KL, and responses of both kinds up to a number of characters."""
    rng = random.Random(0)
    rows = [token_kl_row(rng, [f" token{t}" for t in range(2_000)], i % 2) for i in range(20)]
    peak = rows[0]["kl"][1_500] = 99.0
    view = TokenViewer(pd.DataFrame(rows).assign(first_wrong=1_490))
    assert {c["reward"] for c in view.choices} == {0, 1}
    first = view.data["responses"][0]
    assert (view.choices[0]["peak"], first["total"], len(first["tokens"])) == (peak, 2_000, token_viewer.MAX_TOKENS)
    assert first["tokens"][1_500 - first["start"]]["kl"] == peak
    assert first["tokens"][first["first_wrong"]]["text"] == " token1490"
    assert len(view._repr_html_()) < 2_500_000


def test_without_a_first_wrong_token_none_is_marked() -> None:
    frame = pd.DataFrame([token_kl_row(random.Random(0), ["a", "b"], r) for r in (0, 1)])
    assert [r["first_wrong"] for r in TokenViewer(frame).data["responses"]] == [None, None]
    framed = frame.assign(first_wrong=pd.Series([1, None], dtype=object))
    assert [r["first_wrong"] for r in TokenViewer(framed).data["responses"]] == [1, None]
    assert "No token KL is recorded" in TokenViewer(frame.head(0))._repr_html_()
