"""Plots show the statistics, in colours that a page can replace; panels without data show why."""

from __future__ import annotations

import io
import random
import re
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from sdzero.report import RunFolder, first_wrong, localization, plots
from sdzero.report.page import PALETTE
from sdzero.report.plot_style import INK, MODEL_COLORS, REWARD_COLORS, label, new_figure
from sdzero.report.svg import inline_svg
from support.made_up_run import MODELS, THREE_METHODS, token_kl_row, write_curves, write_evaluation, write_lineage

FLIPS = ("acc1", "acc2", "wrong_to_right_rate", "right_to_wrong_rate")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_lineage(folder)
    for place, model in enumerate(MODELS):
        metrics = {f"eval/{k}_{name}": 0.1 * (place + 1) for k in ("revise", "resample") for name in FLIPS}
        metrics |= {f"{name}_se": 0.01 for name in metrics}
        metrics |= {"eval/revise_tokens1": 30.0 + place, "eval/revise_tokens2": 20.0 + place}
        write_evaluation(folder, model, {"q": [0, 1]}, **metrics)
        at_end = {"eval/response_tokens": [10.0 + place], "eval/keywords_per_response": [0.5], "eval/avg_at_k": [0.6]}
        write_curves(folder / model / "eval", at_end)
    terms = {f"train/loss{term}": [2.0, 1.0] for term in ("", "_generation", "_revision")}
    write_curves(folder / "srt", {**terms, "train/lr": [0.0, 1e-3], "train/grad_norm": [1.0, 2.0]})
    rollouts = {f"rollout/{name}": [0.5, 0.6] for name in ("length", "keywords_per_response", "reward", "logprob_gap")}
    teacher = {"teacher/generation": [0.0, 1.0], "teacher/kl_r0": [0.2, 0.1], "teacher/kl_r1": [0.1, 0.1]}
    write_curves(folder / "self_distill", {"train/loss": [0.2, 0.1], "eval/avg_at_k": {1: 0.7}, **rollouts, **teacher})
    return RunFolder(folder)


@pytest.fixture(scope="module")
def frame():
    rng, question = random.Random(0), "6+3*9="
    rows = []
    for i, response in enumerate(["6+3=8*9=2A2", "6+3=9*9=1A1", "6+3=9*9=4A4"] * 2):
        made = token_kl_row(rng, [*response, "<|end|>"], int(i % 3 == 1))
        rows.append({**made, "question": f"chains/{question}", "text": question, "response": response})
    return pd.DataFrame(rows)


def panels(figure: Figure) -> Any:
    """A figure's axes, of whatever kind their contents are."""
    return figure.axes


def plot_all(run, frame) -> dict[str, Figure]:
    of_frame = {plot.__name__: plot(frame) for plot in (plots.bucket_curve, plots.kl_by_position, plots.localization)}
    of_run = (plots.dynamics, plots.evolution, plots.revision_bars, plots.training_curves)
    return {**of_frame, **{plot.__name__: plot(run) for plot in of_run}}


def svg(figure: Figure) -> str:
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    return file.getvalue()


@pytest.fixture(scope="module")
def figures(run, frame):
    """Every plot with its SVG. Plotting leaves matplotlib's settings as they are."""
    before = dict(matplotlib.rcParams)
    plotted = {name: (figure, svg(figure)) for name, figure in plot_all(run, frame).items()}
    assert dict(matplotlib.rcParams) == before
    return plotted


def test_every_colour_has_a_name_and_the_background_is_left_to_the_page(figures):
    for name, (figure, text) in figures.items():
        colours = set(re.findall(r"#[0-9a-f]{6}\b", text))
        assert INK in colours and colours <= PALETTE.keys(), name
        # SVG defaults to black: every text must set its colour
        assert all("fill" in style for style in re.findall(r"<text style=\"([^\"]*)\"", text)), name
        assert {to_rgba(part.get_facecolor())[3] for part in (figure, *figure.axes)} == {0}, name


def test_a_full_run_leaves_no_panel_empty_and_an_empty_one_shows_why(figures, tmp_path):
    for name, (_, text) in figures.items():
        assert "not logged" not in text and "no token KL" not in text, name
    write_lineage(tmp_path)
    for name, figure in plot_all(RunFolder(tmp_path), pd.DataFrame()).items():
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert re.search("not logged in this run|no token KL was recorded|no wrong response", "|".join(texts)), name


def test_the_bucket_curve_is_figure_4s(frame):
    (axes,) = panels(plots.bucket_curve(frame))
    curve = localization.bucket_curve(frame)
    for line, reward in zip(axes.get_lines(), (0, 1), strict=True):
        np.testing.assert_allclose(line.get_ydata(), curve[curve["reward"] == reward]["mean"])
        assert line.get_color() == REWARD_COLORS[reward]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["r=0 (wrong), 4 responses", "r=1 (right), 2 responses"]


def test_the_bars_are_the_hits_and_what_chance_gives(frame):
    left, right = panels(plots.localization(frame))
    hits, kinds = first_wrong.hits(frame), first_wrong.by_kind(frame)
    expected = [*hits["hit"], hits["chance_result"][0], hits["chance"][0]]
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], 100 * np.array(expected))
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], kinds["kl"])


def test_both_phases_are_equally_wide_and_end_with_an_evaluation(run):
    left, _ = panels(plots.dynamics(run))
    marks = {str(m.get_label()): (m[0].get_xdata()[0], m[0].get_ydata()[0]) for m in left.containers}
    assert marks == {"base": (0, 10.0), "SRT": (1, 11.0), "SD-Zero": (2, 12.0)}
    (rollouts,) = [line for line in left.get_lines() if line.get_label() == "SD-Zero, rollouts"]
    assert rollouts.get_xdata().tolist() == [1, 1.5]
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0", "2 | 0", "2"]


def test_methods_that_start_from_one_model_share_a_phase(tmp_path):
    write_lineage(tmp_path, THREE_METHODS)
    for i, stage in enumerate(THREE_METHODS):
        write_curves(tmp_path / stage.name, {"train/loss": [1.0] * (2 + i), "teacher/generation": [0.0, float(i == 3)]})
        write_curves(tmp_path / stage.evaluation, {"eval/response_tokens": [10.0 + i], "eval/avg_at_k": [0.5 + i / 10]})
    run = RunFolder(tmp_path)
    left, _ = panels(plots.dynamics(run))
    assert left.get_xlabel() == "steps of SFT / RFT / SDFT"
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0", "3 / 4 / 5"]
    (axes,) = panels(plots.evolution(run))
    for plotted, places in ((left, [0, 1, 1, 1]), (axes, [0, 3, 4, 5])):
        marks = [(str(m.get_label()), m[0].get_xdata()[0], m[0].get_color()) for m in plotted.containers]
        names = ["base", "SFT", "RFT", "SDFT"]
        assert marks == [*zip(names, places, MODEL_COLORS[:4], strict=True)]
    (teacher,) = [line for line in axes.get_lines() if line.get_label() == "new teacher"]
    assert list(teacher.get_xdata()) == [2, 2] and teacher.get_color() == MODEL_COLORS[3]


def test_revision_bars_stand_beside_their_baselines(run):
    accuracy, tokens, corrected, _ = panels(plots.revision_bars(run))
    heights = [[patch.get_height() for patch in axes.patches] for axes in (accuracy, tokens, corrected)]
    np.testing.assert_allclose(heights, [[10, 20, 30] * 2, [30, 31, 32, 20, 21, 22], [10, 20, 30] * 2])


def test_an_inline_svg_has_the_colours_of_the_page_and_keeps_its_text() -> None:
    def plot() -> Any:
        figure, (axes,) = new_figure()
        axes.plot([0, 1], [0, 1], color=MODEL_COLORS[1], marker="o")
        label(axes, "a < b & c")
        return figure

    colors = {INK: "currentColor", MODEL_COLORS[1]: "var(--model-1)"}
    first, again = (inline_svg(plot(), "one", "Title", colors) for _ in range(2))
    assert first == again
    assert "a &lt; b &amp; c" in first and "var(--model-1)" in first and "currentColor" in first
    assert not re.search(f"{INK}|{MODEL_COLORS[1]}|<metadata|<style|DejaVu|xmlns", first)
    assert set(re.findall(r' id="(\w+?)-', first)) == {"one"}
