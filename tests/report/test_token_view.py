"""Coloured responses: a model's text stays text, colours say the sign, and pictures show all of it."""

from __future__ import annotations

import io
import random
from html.parser import HTMLParser

import pandas as pd
import pytest

from sdzero.report import token_view
from support.made_up_run import HOSTILE, token_kl_row


class Reader(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def row(tokens, rewards=None):
    made = token_kl_row(random.Random(0), tokens, 0)
    return {**made, "token_kl_reward": rewards or [0.0] * len(tokens)}


def test_hostile_text_stays_text():
    made = {
        **row(list(HOSTILE)),
        "text": HOSTILE[0],
        "reason": HOSTILE[1],
        "teacher_top": [list(HOSTILE)] * len(HOSTILE),
    }
    made["teacher_top_prob"] = [[0.25] * len(HOSTILE)] * len(HOSTILE)
    page = Reader(token_view.token_html(made))
    assert {tag for tag, _ in page.elements} == {"div", "span"}
    assert all(attributes.keys() <= {"style", "title"} for _, attributes in page.elements)
    assert all(text in page.text for text in HOSTILE)
    assert HOSTILE[2] in str(page.elements[-1][1]["title"])


def test_colours_say_the_sign_and_the_size():
    tokens = ["a", "b", "c", "d", "e"]
    page = Reader(token_view.token_html(row(tokens, [0.0, 1.0, -1.0, 2.0, 50.0]), framed=2))
    styles = [str(attributes["style"]) for tag, attributes in page.elements if tag == "span"]
    colors = [style.removeprefix("background:")[:9] for style in styles]
    assert colors[0].endswith("00")  # a zero is not coloured
    assert colors[1][:7] == token_view.TAKEN_BACK and colors[2][:7] == token_view.ADDED_TO
    assert int(colors[1][7:], 16) < int(colors[3][7:], 16) == int(colors[4][7:], 16) < 255
    assert ["outline" in style for style in styles] == [False, False, True, False, False]


def test_a_token_tells_its_figures_and_newlines_are_kept():
    made = row(["1", "\n\n"], [0.25, -0.5])
    made |= {"kl": [1.5, 0.0], "student_top": [["1", "2"], ["\n\n"]], "student_top_prob": [[0.75, 0.2], [1.0]]}
    page = Reader(token_view.token_html(made))
    first = next(attributes for tag, attributes in page.elements if tag == "span")
    assert "KL 1.500, token KL reward +0.250 nats\nstudent: '1' 0.75, '2' 0.20\nreviser: " in str(first["title"])
    assert page.text.endswith("1⏎⏎\n") and "white-space:pre-wrap" in token_view.token_html(made)


@pytest.mark.parametrize("tokens", [["a" * 300], ["word "] * 60, ["x\n", "\n\n", "y", "<|end|>"], ["$x^{$", "\\frac{"]])
def test_a_figure_shows_every_sign_once_and_within_its_width(tokens):
    figure = token_view.token_figure([row(tokens)], [0])
    head, *pieces = figure.axes[0].texts
    assert "".join(text.get_text() for text in pieces) == "".join(tokens).replace("\n", "⏎")
    places = [(text.get_position(), len(text.get_text())) for text in pieces]
    assert all(x + length <= token_view.WIDTH for (x, _), length in places)
    assert len({place for place, _ in places}) == len(places) and head.get_position()[1] < min(
        y for (_, y), _ in places
    )
    figure.savefig(io.BytesIO())  # mathtext would fail here


def test_a_view_frames_the_first_wrong_token_and_says_that_there_is_nothing():
    frame = pd.DataFrame([row(["a", "b"]), row(["c"])]).assign(first_wrong=pd.Series([1, None], dtype=object))
    assert token_view.TokenView(frame).framed == [1, None]
    assert token_view.TokenView(frame)._repr_html_().count("outline") == 1
    assert token_view.TokenView(frame)._repr_png_().startswith(b"\x89PNG")
    nothing = token_view.TokenView(frame.head(0))
    assert nothing._repr_html_() == token_view.NOTHING and nothing._repr_png_().startswith(b"\x89PNG")
