"""Configs in layers: what merging keeps, and what a broken file is refused with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.utils.yaml_config import flatten, load_config, merge

KEYS = st.sampled_from(["a", "b", "c", "class_path", "init_args"])
LEAVES = st.sampled_from([0, 1, None, "x", [1], [2, 3]])
CONFIGS = st.dictionaries(KEYS, LEAVES | st.dictionaries(KEYS, LEAVES, min_size=1))


@given(CONFIGS, CONFIGS)
def test_the_upper_layer_wins_and_the_rest_of_the_lower_stays(below: dict[str, Any], above: dict[str, Any]) -> None:
    merged = merge(below, above)
    if above:
        assert flatten(above).items() <= flatten(merged).items()
    changed = above.get("class_path", below.get("class_path")) != below.get("class_path")
    for key in below.keys() - above.keys():
        assert (key == "init_args" and changed) or merged[key] == below[key]
    assert merge(below, {}) == below and merge({}, above) == merge(above, above) == above


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": [1, 2]}, {"a+": [3]}, {"a": [1, 2, 3]}),
        ({}, {"a+": [3]}, {"a": [3]}),
        ({"x": {"class_path": "A", "init_args": {"a": 1}}}, {"x": {"class_path": "B"}}, {"x": {"class_path": "B"}}),
        (
            {"x": {"class_path": "A", "init_args": {"a": 1}}},
            {"x": {"class_path": "A", "init_args": {"b": 2}}},
            {"x": {"class_path": "A", "init_args": {"a": 1, "b": 2}}},
        ),
        ({"x": {"a": 1}}, {"x": None}, {"x": None}),
        ({"x": {"init_args": {"a": 1}}}, {"x": {"class_path": "A"}}, {"x": {"class_path": "A", "init_args": {"a": 1}}}),
    ],
)
def test_lists_classes_and_null(below: Any, above: Any, merged: Any) -> None:
    assert merge(below, above) == merged


def test_numbers_are_read_as_lightning_cli_reads_them_and_named_files_take_their_place(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/task.yaml").write_text("{lr: 1e-3, rest: more.yaml}")
    (tmp_path / "parts/more.yaml").write_text("[2.5E+2, 3, no-file.yaml]")
    (tmp_path / "a.yaml").write_text("task: parts/task.yaml\n")
    assert load_config(tmp_path / "a.yaml") == {"task": {"lr": 0.001, "rest": [250.0, 3, "no-file.yaml"]}}


@pytest.mark.parametrize(
    ("text", "said"), [("a: [1", "line 1"), ("a: 1\na: 2", "'a' occurs twice"), ("[1]", "mapping")]
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.yaml.*{said}"):
        load_config(tmp_path / "a.yaml")
