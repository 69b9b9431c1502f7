"""docs/troubleshooting.md quotes messages that exist in the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import huggingface_hub.constants
import pytest

from sdzero.cli.main import find_own_error
from support.runs import SMOKE, refusal

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
CELLS = re.findall(r"^\| (.*?) \| .* \|$", PAGE, flags=re.M)
MESSAGES = [
    text.strip()
    for cell in CELLS
    for _, text, _, library in re.findall(r"(`+)(.+?)\1( (\(library\)))?", cell)
    if not library
]
"""Quoted messages of this project, without those of libraries."""


def texts() -> set[str]:
    """Return every string of the source, with … in place of inserted values."""
    found = set()
    for file in [*(ROOT / "src/sdzero").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%[sd]", "…", node.value))  # a log's message
    return found


def test_every_quoted_message_exists_in_the_source() -> None:
    source = texts()
    assert len(MESSAGES) > 50
    assert [message for message in MESSAGES if not any(message in text for text in source)] == []
    assert not [message for message in MESSAGES if len(message.replace("…", "")) < 15], "too short to tell apart"


@pytest.mark.parametrize("stage", ["collect", "srt"])
def test_a_hub_that_is_out_of_reach(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    key, out = ("student.path", "out") if stage == "collect" else ("model.student.path", "trainer.default_root_dir")
    arguments = ("--config", SMOKE / f"{stage}.yaml", f"--{key}=nobody/nothing", f"--{out}={tmp_path}")
    output = refusal(capsys, monkeypatch, "collect" if stage == "collect" else "fit", *arguments)
    assert "student.path: 'nobody/nothing' cannot be read: " in output


def test_a_cause_that_was_never_raised_is_passed_over() -> None:
    with pytest.raises(ValueError, match="last") as caught:
        raise ValueError("last") from KeyError("never raised")
    assert find_own_error(caught.value) is None
