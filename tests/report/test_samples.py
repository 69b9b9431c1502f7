"""Samples of the evaluations: choice of questions, marked phrases, cuts."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sdzero.evaluation.keywords import count_keywords
from sdzero.report import RunFolder, samples
from sdzero.report.samples import SampleView
from support.made_up_run import HOSTILE, sample_row, write_lineage, write_samples


@given(st.text(alphabet="Wait, actualy.\n<>&’'") | st.sampled_from(HOSTILE), st.lists(st.text(min_size=1), max_size=2))
def test_marked_pieces_are_the_text(text: str, phrases: list[str]) -> None:
    pieces = samples.segment(text, phrases)
    assert "".join(piece for piece, _ in pieces) == text
    assert bool(count_keywords(text)) <= any(marked for _, marked in pieces)
    unmarked = [piece for piece, marked in pieces if not marked]
    assert not any(phrase.lower() in piece.lower() for phrase in phrases for piece in unmarked)


def test_phrases_are_those_of_the_config() -> None:
    config = {"student.control_phrases.incorrect": "Nope.", "student.path": "Fine."}
    pieces = samples.segment("1 Nope. Fine. 2 let me rephrase the above solution.", samples.control_phrases([config]))
    assert [piece for piece, marked in pieces if marked] == ["Nope.", "let me rephrase the above solution."]


def test_a_long_answer_is_cut_with_a_note() -> None:
    (piece, _), (note, _) = samples.segment("x" * 5_234, [])
    assert len(piece) == samples.MAX_CHARACTERS and "1,234 more" in note


def test_questions_that_all_models_answered_are_shown_and_keywords_preferred(tmp_path: Path) -> None:
    write_lineage(tmp_path)
    run = RunFolder(tmp_path)
    assert SampleView(run).comparisons == [] and "There are no samples" in SampleView(run)._repr_html_()
    write_samples(tmp_path, "base", [sample_row("a", "wait, base a"), sample_row("b", "base b")])
    rows = [sample_row("a", "srt a"), sample_row("c", "oops"), sample_row("b", "wait, b", 1, "new")]
    write_samples(tmp_path, "srt", rows)
    view = SampleView(run)
    assert [comparison["text"] for comparison in view.comparisons] == [
        "What is a?",
        "What is b?",
    ] and view.num_shared == 2
    (comparison,) = SampleView(run, num=1, with_keywords=True).comparisons
    assert comparison["text"] == "What is b?" and [answer["model"] for answer in comparison["answers"]] == [
        "base",
        "SRT",
    ]
    base, srt = comparison["answers"]
    assert base["verdict"] == "wrong, parsed as 41" and srt["verdict"] == "correct"
    assert base["revision"] is None and srt["revision"]["segments"] == [("new", False)]
