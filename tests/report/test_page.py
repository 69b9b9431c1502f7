"""`sdzero report`: figures are the run's, text stays text whatever a model wrote, the same run gives the same bytes."""

from __future__ import annotations

import json
import random
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.evaluation.keywords import count_keywords
from sdzero.report import RunFolder, render, results, samples, tokens
from sdzero.report.plot_style import label, new_figure
from sdzero.report.plots import COLORS, INK
from sdzero.report.svg import inline_svg
from support.made_up_run import (
    HOSTILE,
    sample_row,
    token_kl_row,
    write_evaluation,
    write_json,
    write_run_of,
    write_samples,
    write_token_kl,
)
from support.runs import exit_code, read_json, records, refusal, sdzero


class Page(HTMLParser):
    """What a browser would see: the elements with their attributes, and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.data: Any = None
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.elements[-1][1].get("type") == "application/json":
                self.data = json.loads(data)
            return
        self.text += data
        if {"td", "th"} & set(self.open) and "small" not in self.open:
            self.rows[-1][-1] += data

    def row(self, heading: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row and row[0].strip() == heading)
        return found

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def numbers(cell: str) -> list[float]:
    return [float(n.replace("−", "-").replace(",", "")) for n in re.findall(r"[+−]?[\d,.]*\d", cell)]


@pytest.fixture(scope="module")
def smoke_page(smoke_run: Path) -> Page:
    return Page(render(RunFolder(smoke_run)))


# --- a whole run ----------------------------------------------------------------------------------


def test_the_table_says_what_the_summary_says(smoke_page: Page, smoke_run: Path) -> None:
    summary = read_json(smoke_run / "summary.json")
    columns = {
        "avg@8": ("accuracy", "accuracy_se"),
        "gain": ("accuracy_gain", "accuracy_gain_se"),
        "pass@8": ("pass_at_8", "pass_at_8_se"),
        "tokens": ("mean_response_tokens",),
        "revision phrases": ("keyword_rate",),
        "generations": ("num_generations",),
        "tokens sampled": ("num_tokens_sampled",),
        "tokens trained on": ("num_tokens_trained",),
        "seconds": ("seconds",),
    }
    for heading, keys in columns.items():
        cells = smoke_page.row(heading)
        assert len(cells) == len(summary) == 3
        for cell, row in zip(cells, summary, strict=True):
            decimals = len(cell.split()[0].partition(".")[2])
            expected = [row[key] for key in keys if row[key]]
            assert numbers(cell) == pytest.approx(expected, abs=0.51 * 10**-decimals), (heading, cell)
    for heading, key in (("wrong → right", "wrong_to_right"), ("right → wrong", "right_to_wrong")):
        for cell, row in zip(smoke_page.row(heading), summary, strict=True):
            rate = read_json(smoke_run / row["stage"] / "eval/results.json")[f"eval/revise_{key}_rate"]
            assert numbers(cell)[:2] == pytest.approx([row[key], rate], abs=0.0051)


def test_a_finished_run_has_every_part(smoke_page: Page, smoke_run: Path) -> None:
    sections = [s["id"] for s in smoke_page.all("section")]
    assert sections == ["results", "curves", "tokens", "samples", "collection", "lineage"]
    assert {a["href"] for a in smoke_page.all("a")} == {f"#{name}" for name in sections}
    assert not [a for _, a in smoke_page.elements if a.get("class") in ("absent", "missing")]
    assert len(smoke_page.data["responses"]) == min(40, len(RunFolder(smoke_run).token_kl()))
    assert len(smoke_page.all("article")) == samples.NUM_QUESTIONS
    figures = [svg for svg in smoke_page.all("svg") if svg["role"] == "img" and svg["aria-label"]]
    assert len(figures) == len(smoke_page.all("figure")) == 5
    lineage = records(smoke_run)
    hashes = {hash for record in lineage.values() for hash in record["outputs"].values()}
    assert hashes <= {code.get("title") for code in smoke_page.all("code")}
    assert all(key in smoke_page.text for record in lineage.values() for key in record["config"])


def test_headings_ids_and_references_are_in_order(smoke_page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in smoke_page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [a["id"] for _, a in smoke_page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    values = [v or "" for _, a in smoke_page.elements for k, v in a.items() if k != "title"]
    named = [name for v in values for name in re.findall(r"url\(#(.*?)\)|^#([\w-]+)$", v)]
    assert named and {a or b for a, b in named} <= {*ids}
    assert all(th.get("scope") in ("row", "col") for th in smoke_page.all("th"))
    assert not [v for v in values if re.match(r"(https?:)?//", v)], "nothing outside is named"


def test_several_benchmarks_have_a_row_each(tmp_path: Path) -> None:
    """The gain is the mean of the benchmarks' own, however many questions they have."""
    base, srt = {"b/1": [0], "b/2": [0], "b/3": [1], "a/1": [1], "a/2": [0]}, {"b/1": [1], "b/2": [0], "b/3": [1]}
    for model, rewards in (("base", base), ("srt", {**srt, "a/1": [0], "a/2": [0]})):
        of_each = {"eval/a/avg_at_k": 0.25, "eval/a/avg_at_k_se": 0.2, "eval/a/pass_at_1": 0.25}
        write_evaluation(tmp_path, model, rewards, **of_each, **{"eval/b/avg_at_k": 0.5, "eval/b/avg_at_k_se": None})
    page = Page(render(RunFolder(tmp_path)))
    assert page.row("avg@1, a") == ["0.250 ±\xa00.200"] * 2 and page.row("avg@1, b") == ["0.500"] * 2
    headings = [row[0].strip() for row in page.rows if row]
    assert headings.index("avg@1, b") < headings.index("avg@1, a"), "in the evaluation's order"
    assert "on 5 held-out questions, averaged over 2 benchmarks." in page.text
    gain = (1 / 3 - 1 / 2) / 2  # b: 1, 0, 0; a: -1, 0
    error = (1 / 9 + 1 / 4) ** 0.5 / 2  # squares 2/3 / 2 / 3, and 1/2 / 1 / 2
    assert numbers(page.row("gain")[1]) == pytest.approx([gain, error], abs=0.0005)


def test_the_same_run_gives_the_same_bytes(smoke_run: Path, tmp_path: Path) -> None:
    """In another process with another order of sets, too."""
    out = tmp_path / "page.html"
    done = sdzero("report", smoke_run, "--out", out, PYTHONHASHSEED="7")
    assert done.returncode == 0 and done.stdout == f"{out}\n", done.stderr
    assert out.read_text() == render(RunFolder(smoke_run))


# --- parts of a run -------------------------------------------------------------------------------


def test_a_partial_run_says_what_is_not_there_yet(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("base", "collect"):
        shutil.copytree(smoke_run / stage, tmp_path / stage)
    whole = read_json(smoke_run / "lineage.json")
    lineage = {stage: whole["stages"][stage] for stage in ("base", "base/eval", "collect", "srt")}
    del lineage["srt"]["seconds"], lineage["srt"]["outputs"]  # begun
    write_json(tmp_path / "lineage.json", {**whole, "stages": lineage})
    assert exit_code(monkeypatch, "report", tmp_path) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "Not finished: srt, srt/eval, self_distill, self_distill/eval." in page.text
    (score,) = page.row("avg@8")
    assert numbers(score)[0] == pytest.approx(read_json(smoke_run / "summary.json")[0]["accuracy"], abs=0.001)
    assert "No token KL is recorded" in page.text and page.data is None
    assert "Collection has not finished" not in page.text and "not finished" in page.text


def test_a_lone_stage_has_a_page(tmp_path: Path) -> None:
    write_json(tmp_path / "collect/questions.json", [])
    page = Page(render(RunFolder(tmp_path)))
    for words in ("No model has been evaluated", "Collection has not finished", "no lineage.json", "No samples"):
        assert words in page.text


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is not the folder of a run" in refusal(capsys, monkeypatch, "report", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples(tmp_path, "base", [sample_row("a", "1")])
    (tmp_path / "report.html").write_text("before")
    (tmp_path / "base/eval/samples/eval-000000-rank1.jsonl").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        exit_code(monkeypatch, "report", tmp_path)
    assert (tmp_path / "report.html").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "report.html"}


# --- text that a model wrote ----------------------------------------------------------------------


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    plain = tuple(f"plain text {i}" for i in range(len(HOSTILE)))
    for name, texts in (("hostile", HOSTILE), ("plain", plain)):
        write_run_of(tmp_path / name, texts)
    hostile, benign = (Page(render(RunFolder(tmp_path / name))) for name in ("hostile", "plain"))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in benign.elements]
    assert [sorted(a) for _, a in hostile.elements] == [sorted(a) for _, a in benign.elements]
    assert all(hostile.text.count(text) >= 7 for text in HOSTILE), "all of it is there to be read"
    assert [token["text"] for token in hostile.data["responses"][0]["tokens"]] == list(HOSTILE)


@given(st.text(alphabet="Wait, actualy.\n<>&’'") | st.sampled_from(HOSTILE), st.lists(st.text(min_size=1), max_size=2))
def test_marked_pieces_are_the_text(text: str, phrases: list[str]) -> None:
    pieces = samples.segments(text, phrases)
    assert "".join(piece for piece, _ in pieces) == text
    assert bool(count_keywords(text)) <= any(marked for _, marked in pieces)
    unmarked = [piece for piece, marked in pieces if not marked]
    assert not any(phrase.lower() in piece.lower() for phrase in phrases for piece in unmarked)


def test_phrases_are_those_of_the_config() -> None:
    lineage = {"collect": {"config": {"student.control_phrases.incorrect": "Nope.", "student.path": "Fine."}}}
    phrases = samples.control_phrases(lineage)
    pieces = samples.segments("1 Nope. Fine. 2 let me rephrase the above solution.", phrases)
    assert [piece for piece, marked in pieces if marked] == ["Nope.", "let me rephrase the above solution."]


def test_a_long_answer_is_cut_and_says_so() -> None:
    (piece, _), (note, _) = samples.segments("x" * 5_234, [])
    assert len(piece) == samples.MAX_CHARACTERS and "1,234 more" in note


# --- words, choice, figures -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "error", "words"),
    [
        (0.1, 0.02, "SRT raised avg@8 from 0.500 to 0.600 (+0.100 ±\xa00.020)"),
        (-0.1, 0.02, "SRT lowered avg@8 from 0.500 to 0.400 (−0.100 ±\xa00.020)"),
        (0.039, 0.02, "SRT did not clearly change avg@8: from 0.500 to 0.539 (+0.039 ±\xa00.020, within its error)"),
        (0.1, None, "SRT moved avg@8 from 0.500 to 0.600 (+0.100, without an error"),
    ],
)
def test_a_gain_is_one_above_two_standard_errors(gain: float, error: float | None, words: str) -> None:
    base = {"stage": "base", "accuracy": 0.5, "accuracy_se": 0.01, "mean_response_tokens": 30.0}
    change = {"accuracy": 0.5 + gain, "accuracy_gain": gain, "accuracy_gain_se": error, "mean_response_tokens": 12.0}
    first, second = results.headline([base, {**base, **change, "stage": "srt"}], 600, 8)
    assert "0.500 ±\xa00.010 on 600" in first
    assert second.startswith(words) and second.endswith("with 40% of the tokens (30 → 12).")


def test_the_viewer_holds_the_largest_peaks_and_an_even_draw(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [token_kl_row(rng, ["a", "b", "c"], i % 2, step=i) for i in range(200)]
    write_token_kl(tmp_path, rows)
    frame = RunFolder(tmp_path).token_kl()
    view = tokens.viewer(frame)
    assert view and view.num_recorded == 200
    largest, drawn = ([c for c in view.choices if c.drawn == kind] for kind in (False, True))
    assert view.choices == [*largest, *drawn]
    assert [c.reward for c in largest] == [0] * tokens.NUM_LARGEST[0] + [1] * tokens.NUM_LARGEST[1]
    for reward, num in tokens.NUM_LARGEST.items():
        peaks = sorted((max(row["kl"]) for row in rows if row["reward"] == reward), reverse=True)
        assert [c.peak for c in largest if c.reward == reward] == pytest.approx(peaks[:num])
    steps = sorted(c.step for c in drawn)
    gaps = [after - before for before, after in pairwise(steps)]
    assert len(drawn) == tokens.NUM_DRAWN and steps[0] < 20 and min(gaps) >= 8 and max(gaps) <= 16
    assert not {*steps} & {c.step for c in largest}
    for choice, shown in zip(view.choices, view.data["responses"], strict=True):
        assert (shown["step"], max(t["kl"] for t in shown["tokens"])) == pytest.approx(
            (choice.step, choice.peak), rel=1e-3
        )

    only_right = tokens.viewer(frame.query("reward == 1"))
    assert only_right and sum(not c.drawn for c in only_right.choices) == sum(tokens.NUM_LARGEST.values())
    few = tokens.viewer(frame.head(3))
    assert few and len(few.choices) == 3


def test_long_responses_keep_the_page_small(tmp_path: Path) -> None:
    """A window around the largest KL, and responses of both kinds up to a number of characters."""
    rng = random.Random(0)
    rows = [token_kl_row(rng, [f" token{t}" for t in range(2_000)], i % 2) for i in range(20)]
    peak = rows[0]["kl"][1_500] = 99.0
    write_token_kl(tmp_path, rows)
    view = tokens.viewer(RunFolder(tmp_path).token_kl())
    assert view and {c.reward for c in view.choices} == {0, 1}
    first = view.data["responses"][0]
    assert (view.choices[0].peak, first["total"], len(first["tokens"])) == (peak, 2_000, tokens.MAX_TOKENS)
    assert first["tokens"][1_500 - first["start"]]["kl"] == peak
    assert len(render(RunFolder(tmp_path))) < 2_000_000


def test_a_figure_takes_the_pages_colours_and_keeps_its_text() -> None:
    def draw() -> Any:
        figure, (axes,) = new_figure()
        axes.plot([0, 1], [0, 1], color=COLORS["srt"], marker="o")
        label(axes, "a < b & c")
        return figure

    first = inline_svg(draw(), "one", "Title", {INK: "currentColor", COLORS["srt"]: "var(--srt)"})
    assert first == inline_svg(draw(), "one", "Title", {INK: "currentColor", COLORS["srt"]: "var(--srt)"})
    assert "a &lt; b &amp; c" in first and "var(--srt)" in first and "currentColor" in first
    assert not re.search(f"{INK}|{COLORS['srt']}|<metadata|<style|DejaVu|xmlns", first)
    assert set(re.findall(r' id="(\w+?)-', first)) == {"one"}
