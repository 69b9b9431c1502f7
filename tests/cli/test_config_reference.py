"""The generated key reference covers every key of every class."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from sdzero import callbacks, engines, tasks
from sdzero.cli.config_reference import default_text, documented_classes, keys, page
from sdzero.methods import Revision, Schedule
from sdzero.types import Sampling

ROOT = Path(__file__).parents[2]
CLASSES = [cls for sections in documented_classes().values() for _, cls in sections]
PAGE = page()
HEADINGS = re.findall(r"^#+ (.*)$", PAGE, flags=re.M)


def test_every_key_has_a_line_in_a_docstring() -> None:
    bare = [f"{cls.__name__}.{key.name}" for cls in CLASSES for key in keys(cls) if not key.doc]
    assert not bare, f"add a line to the `Args:` of the class's docstring for {bare}"
    assert not re.findall(r"\| as in \w+\.? \|", PAGE), "a reference to another class is put in full"


def test_keys_are_those_that_jsonargparse_accepts() -> None:
    for cls in CLASSES:
        parser = ArgumentParser()
        parser.add_class_arguments(cls, "it", fail_untyped=False)
        accepted = {a.dest.split(".")[1] for a in parser._actions if "it." in a.dest}
        assert {key.name for key in keys(cls)} == accepted, cls
        for key in keys(cls):
            if isinstance(key.default, int | float | str | None):
                assert parser.get_defaults()[f"it.{key.name}"] == key.default, (cls, key.name)


def test_every_class_that_a_shipped_config_names_has_a_section() -> None:
    named = {
        path for file in (ROOT / "configs").rglob("*.yaml") for path in re.findall(r"sdzero\.[\w.]+", file.read_text())
    }
    named |= {f"{package.__name__}.{name}" for package in (callbacks, engines, tasks) for name in package.__all__}
    named -= {"sdzero.tasks.Task", "sdzero.trainer.AtomicCheckpointIO"}  # a base class; no keys
    assert len(named) > 15 and [path for path in sorted(named) if f"`{path}`" not in HEADINGS] == []


def test_links_lead_to_headings() -> None:
    anchors = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in HEADINGS}
    links = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert len(links) > 10 and links <= anchors


def test_every_row_has_four_cells() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(rows) > 100 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "`null`"),
        (True, "`true`"),
        (5e-6, "`5e-06`"),
        ("a\n{b}", r'`"a\n{b}"`'),
        ({}, "`{}`"),
        (Path("runs/x"), "`runs/x`"),
        (Schedule(), "its defaults"),
        (Sampling(temperature=0.7), "`{temperature: 0.7}`"),
        (Revision(), "`sdzero.methods.Revision`"),
        (
            lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.0, weight_decay=0.1),
            "`{class_path: torch.optim.SGD, init_args: {lr: 0.5, weight_decay: 0.1}}`",
        ),
    ],
)
def test_defaults_read_like_yaml(value: object, text: str) -> None:
    assert default_text(value) == text
