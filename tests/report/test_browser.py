"""The report in a real browser: no network request, readable contrasts, keyboard access."""

from __future__ import annotations

import html
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sdzero.report import RunFolder, render
from sdzero.report.token_viewer import TokenViewer
from support.made_up_run import HOSTILE, token_kl_row, write_evaluation, write_lineage, write_run_of

pytestmark = pytest.mark.browser

FLAGS = [f"--{flag}" for flag in ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")]
FLAGS += ["--disable-background-networking", "--disable-component-update"]

CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const painted = (colors) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || !element.getClientRects().length) continue;
    const behind = [];
    for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
    const style = getComputedStyle(element);
    const ink = element.ownerSVGElement ? style.fill : style.color;
    const [dark, light] = [painted(behind), painted([...behind, ink])].map(luminance).sort((a, b) => a - b);
    found.push([(light + 0.05) / (dark + 0.05), Boolean(element.ownerSVGElement), text.slice(0, 40)]);
  }
  return found;
}"""
"""Contrast of every visible text with its background, after WCAG 2: [ratio, is in a figure, text]."""


@pytest.fixture(scope="module")
def browser(browser_path: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        yield launched
        launched.close()


class Tab:
    """A page in a window of its own, with its requests and errors."""

    def __init__(self, browser: Any, file: Path, scheme: str = "light", width: int = 1400) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()


@pytest.fixture(scope="module")
def smoke_file(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(RunFolder(smoke_run)))
    return file


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 1400)])
def test_the_page_requests_nothing_and_is_readable(browser: Any, smoke_file: Path, scheme: str, width: int) -> None:
    with Tab(browser, smoke_file, scheme, width) as tab:
        for details in tab.page.locator("details").all():
            details.evaluate("element => element.open = true")
        assert tab.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
        contrasts = tab.page.evaluate(CONTRASTS)
        tab.page.check("[name=mode][value=kl]")
        contrasts += tab.page.evaluate(CONTRASTS)
        assert sum(in_figure for _, in_figure, _ in contrasts) > 50 and len(contrasts) > 500
        assert [found for found in contrasts if found[0] < 4.5] == []
        background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 3 * 128) == (scheme == "light")
        assert tab.requests == [smoke_file.as_uri()]
        assert tab.errors == []


def test_hovering_and_keys_show_the_values_of_a_token(browser: Any, smoke_run: Path, smoke_file: Path) -> None:
    frame = RunFolder(smoke_run).token_kl("self_distill")
    with Tab(browser, smoke_file) as tab:
        page = tab.page
        for index in (0, page.locator("[name=response]").count() - 1):
            page.check(f"[name=response][value='{index}']")
            tokens = page.locator("#token-row [role=option]")
            row = _row(frame, tab)
            peak = max(range(len(row["kl"])), key=row["kl"].__getitem__)
            _assert_shown(tab, row, peak)  # shown first

            hovered = (peak + 1) % len(row["kl"])
            tokens.nth(hovered).hover()
            _assert_shown(tab, row, hovered)
            page.locator("h1").hover()
            _assert_shown(tab, row, peak)

            page.locator("[name=mode]:checked").focus()
            page.keyboard.press("Tab")
            page.keyboard.press("Home")
            _assert_shown(tab, row, 0)
            page.keyboard.press("ArrowRight")
            _assert_shown(tab, row, 1)
            page.keyboard.press("Tab")
            assert page.evaluate("!document.activeElement.closest('#token-row')"), "the row is one stop of the Tab key"
            page.keyboard.press("Shift+Tab")
            assert page.evaluate("document.activeElement.dataset.place") == "1", "and keeps the selected token"
            page.keyboard.press("End")
            page.keyboard.press("ArrowRight")
            _assert_shown(tab, row, len(row["kl"]) - 1)
        assert tab.errors == []


def _row(frame: pd.DataFrame, tab: Tab) -> dict[str, Any]:
    """The recorded response whose tokens the page shows."""
    total = int(tab.text("#token-place").rpartition(" ")[2])
    peak = tab.page.locator("label:has([name=response]:checked) small").inner_text().rpartition(" ")[2]
    question, gold = tab.page.locator("#token-question code").all_inner_texts()
    rows = [dict(zip(map(str, frame.columns), values, strict=True)) for values in frame.itertuples(index=False)]
    rows = [row for row in rows if (row["text"], row["answer"], len(row["tokens"])) == (question, gold, total)]
    (row,) = (row for row in rows if f"{max(row['kl']):.2f}" == peak)
    return row


def _assert_shown(tab: Tab, row: dict[str, Any], place: int) -> None:
    def visible(token: str) -> str:
        return token.replace(" ", "␣").replace("\n", "↵")

    def probability(p: float) -> str:
        return "<0.001" if 0 < p < 0.001 else f"{p:.3f}"

    assert tab.text("#token-place") == f"token {place + 1} of {len(row['kl'])}"
    assert tab.text("#token-text") == visible(row["tokens"][place])
    values = tab.text("#token-values").replace("−", "-")
    words = values.split()
    assert float(words[1]) == pytest.approx(row["kl"][place], abs=6e-4, rel=6e-4)
    reward = row["token_kl_reward"][place]
    assert float(words[6].rstrip(":")) == pytest.approx(reward, abs=6e-4, rel=6e-4)
    bounds = {math.log(2): "less than half as likely", 0.05: "less likely", -0.05: "the teacher agrees"}
    assert next((words for bound, words in bounds.items() if reward > bound), "more likely") in values
    for model in ("student", "teacher"):
        assert tab.text(f"#{model}-own") == probability(float(f"{math.exp(row[f'{model}_logprob'][place]):.4g}"))
        lines = [line.split("\n") for line in tab.page.locator(f"#{model} li").all_inner_texts()]
        top = [*zip(row[f"{model}_top"][place], row[f"{model}_top_prob"][place], strict=True)]
        shown = [[visible(token), probability(float(f"{p:.4g}"))] for token, p in top]
        assert [[part for part in line if part] for line in lines][: len(shown)] == shown
        assert len(lines) == len(top) + (row["tokens"][place] not in row[f"{model}_top"][place])


def test_colours_show_sign_and_size_and_the_first_wrong_token_is_marked(browser: Any, tmp_path: Path) -> None:
    row = token_kl_row(random.Random(0), ["back", "add", "half", "none"], 0)
    values = {"token_kl_reward": [4.0, -4.0, 2.0, 0.0], "kl": [1.0, 0.0, 0.5, 2.0], "first_wrong": 2}
    view = TokenViewer(pd.DataFrame([{**row, **values}]))
    (tmp_path / "report.html").write_text(html.unescape(re.findall('srcdoc="(.*?)"', view._repr_html_(), re.DOTALL)[0]))
    painted = (
        "[...document.querySelectorAll('#token-row span')].map(e => [e.className, e.style.getPropertyValue('--w')])"
    )
    with Tab(browser, tmp_path / "report.html") as tab:
        assert tab.page.evaluate(painted) == [["take", "100%"], ["add", "100%"], ["take marked", "50%"], ["add", "0%"]]
        assert tab.text("#scale-high") == "+4 nats"
        tab.page.check("[name=mode][value=kl]")
        assert [name for name, _ in tab.page.evaluate(painted)] == ["kl", "kl", "kl marked", "kl"]
        assert tab.page.evaluate(painted)[1][1] == "0%" and tab.page.evaluate(painted)[3][1] == "100%"


def test_hostile_text_is_not_run(browser: Any, tmp_path: Path) -> None:
    """Not even where the page's own policy does not stop it."""
    write_run_of(tmp_path, HOSTILE)
    page = render(RunFolder(tmp_path))
    policy, found, rest = page.partition("http-equiv")
    assert found
    (tmp_path / "report.html").write_text(policy + "data-was" + rest)
    with Tab(browser, tmp_path / "report.html") as tab:
        for index in range(len(HOSTILE)):
            tab.page.check(f"[name=response][value='{index}']")
            assert tab.page.locator("#token-row [role=option]").all_inner_texts() == list(HOSTILE)
            tab.page.locator("#token-row [role=option]").first.hover()
        assert tab.page.evaluate("typeof pwned") == "undefined"
        assert tab.requests == [(tmp_path / "report.html").as_uri()]


def test_the_policy_stops_other_scripts_and_every_request(browser: Any, tmp_path: Path) -> None:
    write_run_of(tmp_path, HOSTILE)
    foreign = "<script>pwned = 1</script><img src='https://example.invalid/a.png'></main>"
    (tmp_path / "report.html").write_text(render(RunFolder(tmp_path)).replace("</main>", foreign))
    with Tab(browser, tmp_path / "report.html") as tab:
        assert tab.page.evaluate("typeof pwned") == "undefined"
        assert tab.text("#token-place"), "the page's own script runs"
        assert len(tab.errors) == 2 and all("Content Security Policy" in c for c in tab.errors)


def test_a_run_without_token_kl_raises_no_errors(browser: Any, tmp_path: Path) -> None:
    write_lineage(tmp_path)
    write_evaluation(tmp_path, "base", {"a": [0, 1]})
    (tmp_path / "report.html").write_text(render(RunFolder(tmp_path)))
    with Tab(browser, tmp_path / "report.html", width=360) as tab:
        assert tab.errors == []
        assert tab.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
