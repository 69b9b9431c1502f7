"""`sdzero report`: the page shows the run's values, escapes what a model wrote, and is reproducible."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup

from sdzero.report import RunFolder, render, samples
from sdzero.report.samples import SampleView
from sdzero.report.token_viewer import TokenViewer
from support.made_up_run import (
    HOSTILE,
    THREE_METHODS,
    sample_row,
    write_curves,
    write_evaluation,
    write_json,
    write_lineage,
    write_run_of,
    write_samples,
)
from support.runs import exit_code, read_json, refusal, sdzero


class Page:
    """Elements of a page with their attributes, its text, and the cells of its tables without their hints."""

    def __init__(self, text: str) -> None:
        soup = BeautifulSoup(text, "html.parser", multi_valued_attributes=None)
        self.elements: list[tuple[str, dict[str, Any]]] = [(e.name, dict(e.attrs)) for e in soup.find_all(True)]
        data = soup.find(type="application/json")
        self.data: Any = json.loads(data.text) if data else None
        self.text = soup.get_text()
        for hint in soup.find_all("small"):
            hint.extract()
        self.rows = [[cell.get_text() for cell in row.find_all(["td", "th"])] for row in soup.find_all("tr")]

    def row(self, heading: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row and row[0].strip() == heading)
        return found

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


def numbers(cell: str) -> list[float]:
    return [float(n.replace("−", "-").replace(",", "")) for n in re.findall(r"[+−]?[\d,.]*\d", cell)]


@pytest.fixture(scope="module")
def smoke_page(smoke_run: Path) -> Page:
    return Page(render(RunFolder(smoke_run)))


# --- a whole run ----------------------------------------------------------------------------------


def test_the_table_shows_the_summary(smoke_page: Page, smoke_run: Path) -> None:
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
    assert len(smoke_page.data["responses"]) == min(40, len(RunFolder(smoke_run).token_kl("self_distill")))
    assert len(smoke_page.all("article")) == samples.NUM_QUESTIONS
    figures = [svg for svg in smoke_page.all("svg") if svg["role"] == "img" and svg["aria-label"]]
    assert len(figures) == len(smoke_page.all("figure")) == 5
    records = RunFolder(smoke_run).lineage.stages
    hashes = {hash for record in records.values() for hash in record["outputs"].values()}
    assert hashes <= {code.get("title") for code in smoke_page.all("code")}
    assert all(key in smoke_page.text for record in records.values() for key in record["config"])


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
    write_lineage(tmp_path)
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


def test_the_page_of_a_partial_run_names_what_is_missing(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("base", "collect"):
        shutil.copytree(smoke_run / stage, tmp_path / stage)
    lineage = RunFolder(smoke_run).lineage
    records = {stage: lineage.stages[stage] for stage in ("base", "base/eval", "collect", "srt")}
    del records["srt"]["seconds"], records["srt"]["outputs"]  # started, not finished
    write_lineage(tmp_path, lineage.recipe.stages, records)
    assert exit_code(monkeypatch, "report", tmp_path) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "Not finished: srt, srt/eval, self_distill, self_distill/eval." in page.text
    (score,) = page.row("avg@8")
    assert numbers(score)[0] == pytest.approx(read_json(smoke_run / "summary.json")[0]["accuracy"], abs=0.001)
    assert "No token KL is recorded" in page.text and page.data is None
    assert "No collection has finished" not in page.text and "not finished" in page.text


def test_a_lone_stage_has_a_page(tmp_path: Path) -> None:
    write_json(tmp_path / "collect/statistics.json", {})
    page = Page(render(RunFolder(tmp_path)))
    for words in ("No model has been evaluated", "No collection has finished", "No token KL", "There are no samples"):
        assert words in page.text


def test_three_methods_that_share_a_base_stand_side_by_side(tmp_path: Path) -> None:
    write_lineage(tmp_path, THREE_METHODS)
    for i, stage in enumerate(THREE_METHODS):
        write_evaluation(tmp_path, stage.name, {"q/1": [0, 1], "q/2": [int(i > 0), 1], "q/3": [0, int(i > 1)]})
        write_curves(tmp_path / stage.name, {"train/loss": [2.0, 1.0]})
        write_curves(tmp_path / stage.evaluation, {"eval/response_tokens": [10.0 + i]})
    page = Page(render(RunFolder(tmp_path)))
    assert [row[1:] for row in page.rows[:1]] == [["base", "SFT", "RFT", "SDFT"]]
    assert [numbers(cell)[:1] for cell in page.row("gain")] == [[], [0.167], [0.333], [0.333]]
    assert page.text.count(" of base (30 → 30).") == 3
    figures = [svg["aria-label"] for svg in page.all("svg")]
    assert figures == ["Length and revision phrases", "Accuracy during training", *figures[2:]]
    styles = " ".join(a["style"] or "" for _, a in page.elements if "style" in a)
    assert all(f"var(--model-{i})" in styles for i in range(4))


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is not the folder of a run" in refusal(capsys, monkeypatch, "report", tmp_path)
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "lineage.json", {"srt": {"config": {}}})
    assert "older version of sdzero" in refusal(capsys, monkeypatch, "report", tmp_path)


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lineage(tmp_path)
    write_samples(tmp_path, "base", [sample_row("a", "1")])
    (tmp_path / "report.html").write_text("before")
    (tmp_path / "base/eval/samples/eval-000000-rank1.jsonl").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        exit_code(monkeypatch, "report", tmp_path)
    assert (tmp_path / "report.html").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lineage.json", "report.html"}


# --- text that a model wrote ----------------------------------------------------------------------


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    plain = tuple(f"plain text {i}" for i in range(len(HOSTILE)))
    for name, texts in (("hostile", HOSTILE), ("plain", plain)):
        write_run_of(tmp_path / name, texts)
    hostile, benign = (Page(render(RunFolder(tmp_path / name))) for name in ("hostile", "plain"))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in benign.elements]
    assert [sorted(a) for _, a in hostile.elements] == [sorted(a) for _, a in benign.elements]
    assert all(hostile.text.count(text) >= 7 for text in HOSTILE), "all of it can be read"
    assert [token["text"] for token in hostile.data["responses"][0]["tokens"]] == list(HOSTILE)


def test_notebooks_show_the_same_parts_in_frames(tmp_path: Path) -> None:
    write_run_of(tmp_path, HOSTILE)
    run = RunFolder(tmp_path)
    page = Page(render(run))
    for view in (TokenViewer(run.token_kl("self_distill")), SampleView(run)):
        ((tag, attributes),) = Page(view._repr_html_()).elements
        assert tag == "iframe"
        part = Page(attributes["srcdoc"])
        assert {tag for tag, _ in part.elements} <= {tag for tag, _ in page.elements}
        assert part.data in (None, page.data) and len(part.all("article")) in (0, len(page.all("article")))
        assert part.all("meta") == page.all("meta"), "with the same security policy"
